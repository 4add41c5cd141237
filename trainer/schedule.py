"""What a cycle is about and when one is due. Imports no torch, so that a trainer that waits stays small."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedback import files
from trainer.config import CycleSettings, HardwareSettings, PPOSettings, RewardModelSettings, RolloutsSettings

if TYPE_CHECKING:
    from deploy.manifest import BaseModelDigests
    from feedback.archive import Archive
    from trainer.facts import Fact


NO_OUTCOME = ("min_new_ratings", "niceness", "metrics_port", "metrics_host", "held_out", "probes", "facts")
"""Settings of a cycle that only say when and how it runs, or where what stands in the job was read."""


def code_version() -> str:
    """The installed version and a digest of the trainer's own source."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(path.name.encode() + path.read_bytes())
    return f"{importlib.metadata.version('plaudit')}+{sha.hexdigest()[:12]}"


@dataclass(frozen=True)
class LearningSettings:
    """All sections that learning reads."""

    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    cycle: CycleSettings = field(default_factory=CycleSettings)
    code_version: str = field(default_factory=code_version)
    rollouts: RolloutsSettings = field(default_factory=RolloutsSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)

    def as_json(self) -> dict[str, Any]:
        """What the outcome depends on, without the code version."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("reward_model", "ppo", "cycle")}
        for name in NO_OUTCOME:
            del sections["cycle"][name]
        # Where replies come from and what computes round differently; how the work is shared out does not show.
        return sections | {"rollouts": "vllm" if self.rollouts.urls else "local", "hardware": self.hardware.model_dump(exclude={"shard"})}


@dataclass(frozen=True)
class Job:
    """What to learn from, for which policy, and what to judge the result on."""

    policy: Path
    policy_name: str
    snapshot: Path
    system_prompt: str | None
    temperature: float
    max_tokens: int
    max_model_len: int
    held_out: Sequence[str]
    probes: Sequence[str]
    facts: Sequence[Fact]
    stable: Path | None = None
    """Folder of the adapter that answers people now; None where that is the base."""
    answered_by: Mapping[str, BaseModelDigests] | None = None
    """The base of every adapter that is known, by the adapter's id; says whether rated answers are another model's. Changes no outcome."""

    def as_json(self) -> dict[str, Any]:
        plain = ("policy_name", "system_prompt", "temperature", "max_tokens", "max_model_len")
        facts = [[fact.prompt, fact.answer, list(fact.distractors), fact.entity] for fact in self.facts]
        return {name: getattr(self, name) for name in plain} | {
            "held_out": list(self.held_out),
            "probes": list(self.probes),
            "facts": hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
            "stable": self.stable.name if self.stable else None,
        }


def cycle_id(job: Job, settings: LearningSettings, snapshot_digest: str) -> str:
    """16 hex digits of a digest over everything that the outcome depends on."""
    whole = {"job": job.as_json(), "settings": settings.as_json(), "snapshot": snapshot_digest, "code": settings.code_version}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def ratings_now(archive: Archive) -> int:
    """How many opinions are held at this moment; changing one's mind does not add."""
    return sum(event.slot in ("rating", "choice") for event in archive.current())


def should_train(archive: Archive, settings: CycleSettings, data_dir: Path) -> bool:
    """Whether enough was said since the last cycle that finished. Call `trained` after a cycle."""
    return ratings_now(archive) - ratings_then(data_dir) >= settings.min_new_ratings


@dataclass(frozen=True)
class Begun:
    """A cycle that was started: its snapshot, and how many ratings there were then."""

    snapshot: Path
    ratings: int


def begun(data_dir: Path) -> Begun | None:
    """The cycle that a killed trainer left. It is finished first, because ratings that came in since would make another one."""
    path = data_dir / "cycles" / "begun.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    snapshot = data_dir / "snapshots" / str(found["snapshot"])
    return Begun(snapshot, int(found["ratings"])) if snapshot.is_dir() else None


def begin(snapshot: Path, ratings: int, data_dir: Path) -> Begun:
    """Remember that a cycle about this snapshot has started."""
    _write(data_dir / "cycles" / "begun.json", {"snapshot": snapshot.name, "ratings": ratings})
    return Begun(snapshot, ratings)


def give_up(data_dir: Path) -> None:
    """Forget the cycle that was begun; one that was refused would be refused again."""
    (data_dir / "cycles" / "begun.json").unlink(missing_ok=True)


def trained(ratings: int, data_dir: Path) -> None:
    """Remember how many ratings there were when the last cycle took its snapshot."""
    _write(data_dir / "cycles" / "last.json", {"ratings": ratings})
    give_up(data_dir)


def _write(path: Path, value: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(value).encode())


def ratings_then(data_dir: Path) -> int:
    """How many there were when the last finished cycle took its snapshot; 0 before the first."""
    path = data_dir / "cycles" / "last.json"
    return int(json.loads(path.read_text())["ratings"]) if path.exists() else 0
