"""Our reward model as a contestant: `python -m benchmarks.peers.ours_reward spec.json result.json`.

From the file to the features and one fit, as the product goes. What it read is kept for the other contestants and for further folds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  (part of what imports take, as in the other's process)
from peft import LoraConfig  # noqa: F401  (the same)
from torch import Tensor

from benchmarks.human_pairs import TAIL, import_pairs, tail
from benchmarks.peers.meter import Meter
from trainer.config import RewardModelSettings
from trainer.labels import from_snapshot
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.reward_model import fit
from trainer.ridge import folds_of


class Reader(Policy):
    """Reads tails, and remembers what was tokenised."""

    seen: list[Reply]

    def reply(self, messages: Sequence[dict[str, Any]], system_prompt: str | None, answer: str, finished: bool) -> Reply:
        found = super().reply(messages, system_prompt, answer, finished)
        self.seen.append(tail(found))
        return found

    def features(self, replies: Sequence[Reply]) -> Tensor:
        return super().features([tail(reply) for reply in replies])


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    meter = Meter()
    rows, _ = import_pairs(Path(spec["folder"]), spec["pairs"])
    began = time.perf_counter()
    policy = Reader.load(Path(spec["model"]))
    assert isinstance(policy, Reader)
    policy.seen = []
    labels = from_snapshot(rows, policy, None)
    features_s = time.perf_counter() - began
    seen = policy.seen[: len(labels.answers)]
    assert all(len(reply.tokens) == min(answer.tokens, TAIL - 1) for reply, answer in zip(seen, labels.answers, strict=True))
    fold_of = folds_of(len(labels.prompts), spec["folds"], spec["seed"])
    began = time.perf_counter()
    fit(labels.where_prompt(fold_of != 0), RewardModelSettings())
    fit_s = time.perf_counter() - began
    result = meter.result(
        features_s=features_s,
        fit_s=fit_s,
        answers=[[*reply.prompt, *reply.tokens] for reply in seen],
    )
    labels.save(Path(spec["labels"]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
