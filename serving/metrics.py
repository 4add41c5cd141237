"""What the gateway counts. Each metric is described in `docs/api.md`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

ANSWERS = Counter("plaudit_answers", "Answers by arm and by how they ended", ["arm", "finish"])
COMPARISONS = Counter("plaudit_comparisons", "Comparisons, of stable with itself or with the canary, shown or void", ["kind", "outcome"])
IN_FLIGHT = Gauge("plaudit_answers_in_flight", "Answers being streamed now")
FIRST_BYTE = Histogram("plaudit_first_byte_seconds", "From the request's arrival to the reply's first byte", buckets=_FAST)
COMMIT = Histogram("plaudit_commit_seconds", "Time to commit an event durably", ["event"], buckets=_FAST)
UNRECORDED = Counter("plaudit_unrecorded_answers", "Answers given without a record because the log could not be written")
FEEDBACK = Counter("plaudit_feedback", "Feedback acknowledged, by kind", ["kind"])
REFUSED = Counter("plaudit_refused_requests", "Requests refused, by status", ["status"])
ROUTE_AGE = Gauge("plaudit_route_age_seconds", "Age of the routing table in use")
ROUTE_VERSION = Gauge("plaudit_route_version", "Version of the routing table in use")
RELAY_PENDING = Gauge("plaudit_relay_pending", "Events of this data folder that wait to be carried to Kafka")
DEAD_LETTERS = Gauge("plaudit_dead_letters", "Events of this data folder that Kafka will not take")
