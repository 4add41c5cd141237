"""What Prometheus reads of the trainer."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import closing

import pytest
from prometheus_client import REGISTRY

from deploy.process import free_port
from feedback.errors import ConfigError, TrainingRefused
from trainer import metrics

MEASURED = {"step": 3, "score": 1.5, "kl_nats": 2.5, "beta": 0.25, "explained_variance": 0.5, "clipfrac": 0.125, "stop_score": None}


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_a_step_and_a_stage_are_there_to_read() -> None:
    metrics.step(7, MEASURED)
    assert (value("plaudit_trainer_step", seed="7"), value("plaudit_trainer_kl_nats", seed="7")) == (3, 2.5)
    with metrics.stage("reward"):
        pass
    assert value("plaudit_trainer_stage_seconds", stage="reward") is not None


def test_every_end_of_a_cycle_is_counted_once() -> None:
    def ended(outcome: str) -> float:
        return value("plaudit_trainer_cycles_total", outcome=outcome) or 0.0

    before = {outcome: ended(outcome) for outcome in ("candidate", "refused", "failed")}
    with metrics.cycle():
        pass
    with pytest.raises(TrainingRefused), metrics.cycle():
        raise TrainingRefused("labels: 0 ratings")
    with pytest.raises(MemoryError), metrics.cycle():
        raise MemoryError
    assert {outcome: ended(outcome) - before[outcome] for outcome in before} == {"candidate": 1, "refused": 1, "failed": 1}
    assert value("plaudit_trainer_last_cycle_timestamp_seconds", outcome="refused")


def test_they_are_served_where_a_port_is_set_and_a_taken_port_is_named() -> None:
    metrics.serve("127.0.0.1", 0)  # off
    metrics.step(7, MEASURED)
    server = metrics.serve("127.0.0.1", port := free_port())
    assert server is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert 'plaudit_trainer_beta{seed="7"} 0.25' in reply.read().decode()
    server()
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(ConfigError, match=r"cycle\.metrics_port is \d+, which cannot"),
    ):
        metrics.serve("127.0.0.1", taken.getsockname()[1])
