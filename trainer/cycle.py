"""One turn of learning: ratings -> reward model -> PPO -> evaluation -> adapter -> candidate.

Each stage writes its result into the cycle's folder, atomically, and is skipped where the result is there already; PPO
continues at its last iteration. So a killed trainer goes on where it was. The folder's name is a digest of everything
that the outcome depends on, so the same ratings and settings always lead to the same folder.

    job.json  labels.safetensors  base.safetensors  reward.json  reward_model.safetensors  [watch_model.safetensors]
    ppo.pt  metrics.jsonl  policy/  ppo.json  evaluation.json  details.json  adapter.json

At the end the files with what people wrote are deleted. Where somebody in the snapshot is erased meanwhile the cycle is refused and its
folder goes; `start.py` begins another one without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.lineage import forget
from deploy.manifest import base_config
from feedback.snapshot import load as load_snapshot
from trainer import metrics
from trainer.labels import Progress
from trainer.processor import use_threads
from trainer.schedule import Job, LearningSettings, cycle_id
from trainer.stages import Stages, read_json, refuse_redacted, write_json

if TYPE_CHECKING:
    from deploy.registry import Registry


@dataclass(frozen=True)
class CycleResult:
    """What a finished cycle leaves."""

    folder: Path
    adapter_id: str
    adapter: Path
    evaluation: dict[str, Any]
    seconds: dict[str, float]
    """Of each stage; only of this run, so a stage that was there already took none."""


def run_cycle(
    job: Job,
    settings: LearningSettings,
    data_dir: Path,
    *,
    registry: Registry | None = None,
    by: str = "trainer",
    progress: Progress | None = None,
    finished: Callable[[str], None] | None = None,
) -> CycleResult:
    """Run or finish the cycle of this job. `finished` hears the name of each stage once it is durable.

    Raises TrainingRefused where the data or the settings cannot train, SnapshotRedacted where somebody in it was erased, InvalidInput
    where the policy is no model.
    """
    base_config(job.policy)  # refused before anything is written
    use_threads(job.policy, settings.cycle.threads)
    snapshot = load_snapshot(job.snapshot)
    folder = data_dir / "cycles" / cycle_id(job, settings, snapshot.digest)
    refuse_redacted(snapshot, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", {"job": job.as_json(), "settings": settings.as_json(), "snapshot": snapshot.digest})
    cycle = Stages(job, settings, snapshot, folder, progress or (lambda what, share: None))
    seconds: dict[str, float] = {}
    stages: dict[str, Callable[[], None]] = {
        "labels": cycle.label,
        "base": cycle.sample_base,
        "reward": cycle.fit_rewards,
        "ppo": cycle.improve,
        "evaluation": cycle.judge,
        "adapter": lambda: cycle.publish(data_dir / "adapters"),
    }
    for name, stage in stages.items() if not (folder / "adapter.json").exists() else ():
        started = time.perf_counter()
        try:
            with metrics.stage(name):
                stage()
        finally:
            # An erasure takes the folder's files away under a running stage; then this is the error to see. It deletes what lies there
            # after it has redacted the snapshot, and we look at the snapshot after we have written, so nothing escapes both.
            refuse_redacted(snapshot, folder)
        seconds[name] = round(time.perf_counter() - started, 2)
        if finished:
            finished(name)
    forget(folder)  # what people wrote does not outlive its use
    made = read_json(folder / "adapter.json")
    result = CycleResult(folder, made["adapter_id"], Path(made["path"]), read_json(folder / "evaluation.json"), seconds)
    if registry is not None:
        registry.register(result.adapter_id, result.adapter, by)
        if not registry.attestations(result.adapter_id, "training"):
            registry.attest(result.adapter_id, "training", _training_body(folder, seconds), by)
    # An erasure looks for adapters after it has redacted the snapshot: either it finds this one or we stop here. Every process looks,
    # also those without a registry, because what one asks of the first one all must ask.
    refuse_redacted(snapshot, folder)
    if registry is not None and not registry.attestations(result.adapter_id, "evaluation"):
        # Last, because this one starts the gates.
        registry.attest(result.adapter_id, "evaluation", result.evaluation, by)
    return result


def _training_body(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    ppo = read_json(folder / "ppo.json")
    return {
        "cycle": folder.name,
        "seconds": seconds,
        "reward_model": read_json(folder / "reward.json"),
        "judged_against": read_json(folder / "job.json")["job"]["stable"],
        "stopped_because": ppo["stopped_because"],
        "warnings": [f"PPO, step {step['step']}: {words}" for step in ppo["steps"] for words in step["alarms"]],
    }
