"""What Prometheus sees of the trainer, where `cycle.metrics_port` is set. Each metric is described in `docs/api.md`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, start_http_server

from feedback.errors import ConfigError, PlauditError

STEP = Gauge("plaudit_trainer_step", "PPO's iteration, by seed", ["seed"])
SCORE = Gauge("plaudit_trainer_score", "Mean proxy reward of the last rollouts, in sd of base's answers, by seed", ["seed"])
KL = Gauge("plaudit_trainer_kl_nats", "KL of the last rollouts to the reference, in nats a reply, by seed", ["seed"])
BETA = Gauge("plaudit_trainer_beta", "Weight of the KL penalty, by seed", ["seed"])
EXPLAINED_VARIANCE = Gauge("plaudit_trainer_explained_variance", "Of the returns, by the critic, by seed", ["seed"])
CLIPFRAC = Gauge("plaudit_trainer_clipfrac", "Share of tokens whose ratio was clipped, by seed", ["seed"])
STAGE = Gauge("plaudit_trainer_stage_seconds", "What a stage of the last cycle took", ["stage"])
CYCLES = Counter("plaudit_trainer_cycles", "Cycles that ended, by outcome (candidate, refused, failed)", ["outcome"])
LAST = Gauge("plaudit_trainer_last_cycle_timestamp_seconds", "When a cycle last ended so, by outcome", ["outcome"])

OF_STEP = {
    "step": STEP,
    "score": SCORE,
    "kl_nats": KL,
    "beta": BETA,
    "explained_variance": EXPLAINED_VARIANCE,
    "clipfrac": CLIPFRAC,
}


def serve(host: str, port: int) -> Callable[[], None] | None:
    """Answer `GET /metrics` from a thread until the process ends, or what is returned is called; port 0 is off.

    Raises ConfigError where the port is taken.
    """
    if port == 0:
        return None
    try:
        server, thread = start_http_server(port, addr=host)
    except OSError as exc:
        told = f"cycle.metrics_port is {port}, which cannot be used on {host}: {exc.strerror}; choose another one"
        raise ConfigError(told, field="cycle.metrics_port") from exc

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def step(seed: int, measured: Mapping[str, float | None]) -> None:
    """What one iteration of PPO measured."""
    for name, gauge in OF_STEP.items():
        if (value := measured[name]) is not None:
            gauge.labels(str(seed)).set(value)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Inside, this stage of the cycle runs."""
    started = time.perf_counter()
    try:
        yield
    finally:
        STAGE.labels(name).set(time.perf_counter() - started)


@contextmanager
def cycle() -> Iterator[None]:
    """Inside, a cycle runs; however it ends is counted."""
    outcome = "failed"
    try:
        yield
        outcome = "candidate"
    except PlauditError:
        outcome = "refused"
        raise
    finally:
        CYCLES.labels(outcome).inc()
        LAST.labels(outcome).set_to_current_time()
