"""Scores what a running rollout's arms answer people, with the reward model that the canary was trained on: `interaction.scored`.

A reward model compares answers to one prompt; what it says of a whole prompt means nothing, and people differ in what they ask. So
each prompt has its own zero here as in training: the mean of `base_samples` answers of the base, drawn by the prompt and hence the same
for every arm and after a restart. Zeros are kept in memory only, because they come from what people wrote. The unit is that of training.

Nothing is scored twice: an event's id is computed from interaction and reward model. Where it was is written down, and it reads again
what came shortly before, because another process's events may arrive late. Erased and withdrawn people are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch
from torch import Tensor

from deploy.config import PolicySettings
from deploy.records import RolloutRecord
from deploy.registry import Registry
from feedback import files
from feedback.archive import Interaction
from feedback.clock import COUNTER_BITS
from feedback.errors import Gone
from feedback.events import FinishedText, InteractionFinished, InteractionScored, StartedText
from feedback.snapshot import TRAINABLE
from feedback.stores import Stores
from trainer.config import HardwareSettings
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.reward_model import RewardModel, load
from trainer.score import Normaliser, Prompt, Scorer
from trainer.stages import read_json

LATE_MS = 60_000
"""Events that arrive later than this after a younger one was read may stay without a score."""
KEPT_ZEROS = 1_000
BATCH = 200

log = structlog.get_logger(__name__)


@dataclass
class CanaryScorer:
    """One rollout's: its reward model, zero and unit. Made by `of`."""

    rollout: RolloutRecord
    model: RewardModel
    model_id: str
    policy: Policy
    asked: PolicySettings
    base_samples: int
    zero: float
    unit: float
    clip: float
    _centres: OrderedDict[Prompt, Tensor] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, rollout: RolloutRecord, registry: Registry, data_dir: Path, policy: Policy, asked: PolicySettings) -> CanaryScorer | None:
        """None where the canary was not trained here, so that there is no reward model of its cycle."""
        training = registry.attestations(rollout.adapter, "training")
        folder = data_dir / "cycles" / str(training[-1].body["cycle"]) if training else data_dir / "cycles" / "none"
        if not (folder / "reward_model.safetensors").exists() or not (folder / "ppo.json").exists():
            return None
        settings, scale = read_json(folder / "job.json")["settings"]["reward_model"], read_json(folder / "ppo.json")["scale"]
        return cls(
            rollout=rollout,
            model=load(folder / "reward_model.safetensors", policy),
            model_id=read_json(folder / "reward.json")["id"],
            policy=policy,
            asked=asked,
            base_samples=settings["base_samples"],
            zero=scale["zero"],
            unit=scale["unit"],
            clip=settings["clip"],
        )

    def score(self, reply: Reply) -> float:
        """mean - 0.5 sd from the prompt's zero in sd of the base's answers, as in training."""
        centre_P = self._centre(reply.prompt)
        scorer = Scorer(self.model, Normaliser({reply.prompt: centre_P}, self.zero, self.unit, torch.zeros(0)), self.clip)
        return float(scorer([reply], self.policy.features([reply]))[0])

    def _centre(self, prompt: Prompt) -> Tensor:
        """Mean of the mapped features of the base's answers to this prompt."""
        if prompt not in self._centres:
            seed = int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:6], "big")
            with self.policy.reference():
                drawn = self.policy.sample(
                    [prompt] * self.base_samples, max_tokens=self.asked.max_tokens, temperature=self.asked.temperature, seed=seed
                )
            self._centres[prompt] = self.model.mapped(self.model.features(drawn, self.policy.features(drawn))).mean(0)
            while len(self._centres) > KEPT_ZEROS:
                self._centres.popitem(last=False)
        self._centres.move_to_end(prompt)
        return self._centres[prompt]


class InteractionScorer:
    """Looks at the archive again and again and writes what is new; see `once`."""

    def __init__(
        self, stores: Stores, registry: Registry, policy: Path, asked: PolicySettings, hardware: HardwareSettings | None = None
    ) -> None:
        self.stores, self.registry, self.asked, self.hardware = stores, registry, asked, hardware or HardwareSettings()
        self._folder = policy
        self._data_dir = stores.settings.feedback.data_dir
        self._policy: Policy | None = None
        self._canary: CanaryScorer | None = None
        self._looked_at: tuple[str, set[str]] = ("", set())
        """A rollout, and interactions of it that this process is done with."""

    def once(self) -> Counter[str]:
        """Score what the running canary, its baseline and stable answered since; how many were `scored`, and what others were."""
        found: Counter[str] = Counter()
        rollout = self.registry.active_rollout()
        if rollout is None or rollout.canary_ms is None:
            self._canary, self._looked_at = None, ("", set())
            return found
        canary = self._of(rollout)
        if canary is None:
            return found
        self.stores.ingest()
        begun = rollout.canary_ms << COUNTER_BITS
        position = self._position(rollout.id, begun)
        after = max(begun, position - (LATE_MS << COUNTER_BITS))
        while events := self.stores.archive.events("interaction.finished", after, BATCH):
            withdrawn = self.stores.archive.withdrawn()
            for event in events:
                if isinstance(event, InteractionFinished) and event.interaction_id not in self._looked_at[1]:
                    found[self._score(canary, event, withdrawn)] += 1
                    self._looked_at[1].add(event.interaction_id)
            after = events[-1].stamp
            self._remember(rollout.id, max(position, after))
        return found

    def _of(self, rollout: RolloutRecord) -> CanaryScorer | None:
        if rollout.id != self._looked_at[0]:
            self._looked_at = (rollout.id, set())
            self._policy = self._policy or Policy.load(self._folder, device=self.hardware.device, dtype=self.hardware.dtype)
            self._canary = CanaryScorer.of(rollout, self.registry, self._data_dir, self._policy, self.asked)
            if self._canary is None:
                log.warning(
                    "scorer.no_reward_model", rollout=rollout.id, adapter=rollout.adapter, next="only adapters trained here have one"
                )
        return self._canary

    def _score(self, canary: CanaryScorer, event: InteractionFinished, withdrawn: set[str]) -> str:
        """What became of one interaction."""
        archive, event_id = self.stores.archive, self.stores.subjects.ids.content("scored", event.interaction_id, canary.model_id)
        interaction = archive.interaction(event.interaction_id)
        if interaction is None or interaction.started.subject in withdrawn:
            return "erased or withdrawn"
        if interaction.started.source == "import" or event.finish_reason not in TRAINABLE:
            return "no answer to a person"
        if archive.has(event_id):
            return "scored before"
        try:
            reply = self._reply(canary, interaction)
        except Gone:
            return "erased or withdrawn"
        if reply is None:
            return "empty or longer than the context"
        score = canary.score(reply)
        if archive.interaction(event.interaction_id) is None:
            return "erased or withdrawn"  # meanwhile
        scored = InteractionScored(
            event_id=event_id,
            tenant=interaction.started.tenant,
            interaction_id=event.interaction_id,
            reward_model=canary.model_id,
            score=score,
        )
        self.stores.log.append_sync([scored])
        return "scored"

    def _reply(self, canary: CanaryScorer, interaction: Interaction) -> Reply | None:
        """The answer as it was served. Raises Gone after one of its people was erased."""
        finished = interaction.finished
        if interaction.started.sealed is None or finished is None or finished.sealed is None:
            return None
        asked = self.stores.subjects.open(interaction.started.sealed, StartedText)
        said = self.stores.subjects.open(finished.sealed, FinishedText)
        if not said.answer.strip():
            return None
        reply = canary.policy.reply(asked.messages, self.asked.system_prompt, said.answer, finished.finish_reason == "stop")
        return reply if len(reply.prompt) + self.asked.max_tokens <= self.asked.max_model_len else None

    @property
    def _place(self) -> Path:
        return self._data_dir / "scorer.json"

    def _position(self, rollout: str, begun: int) -> int:
        """The stamp up to which this rollout's answers were read."""
        try:
            found = json.loads(self._place.read_text())
        except (FileNotFoundError, ValueError):
            return begun
        return int(found["after"]) if found["rollout"] == rollout else begun

    def _remember(self, rollout: str, after: int) -> None:
        files.replace(self._place, json.dumps({"rollout": rollout, "after": after}).encode())
