"""Did the adapter forget anything? Right answers against their hardest distractors, base and candidate paired.

RLHF tunes behaviour, not facts, so facts are protected by a gate. An item counts as right where the log-likelihood of
its answer exceeds that of every distractor. The bound on the harm is one-sided 95 %, fixed n, bootstrapped by entity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from feedback.errors import InvalidInput

if TYPE_CHECKING:
    from trainer.labels import Progress
    from trainer.policy import Policy

BOOTSTRAPS = 2000
BATCH = 16
ONE_SIDED_95 = 1.644854
POWER_80 = 0.841621


class Fact(Protocol):
    """A question whose right answer is known."""

    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def distractors(self) -> tuple[str, ...]: ...
    @property
    def entity(self) -> str: ...


@dataclass(frozen=True)
class FactLine:
    """One line of a facts file."""

    prompt: str
    answer: str
    distractors: tuple[str, ...]
    entity: str


def read_facts(path: Path) -> list[FactLine]:
    """From JSONL with prompt, answer, distractors and entity. Raises InvalidInput naming line and field."""
    facts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInput(f"cycle.facts: {path} cannot be read: {exc}", field="cycle.facts") from exc
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            fact = FactLine(str(found["prompt"]), str(found["answer"]), tuple(map(str, found["distractors"])), str(found["entity"]))
        except (ValueError, TypeError, KeyError) as exc:
            raise InvalidInput(f"{path.name} line {number}: {exc!r}; needed: prompt, answer, distractors, entity", field="facts") from exc
        if not fact.distractors or fact.answer in fact.distractors:
            raise InvalidInput(f"{path.name} line {number}: distractors must be there and differ from the answer", field="distractors")
        facts.append(fact)
    return facts


def write_facts(path: Path, facts: Sequence[Fact]) -> None:
    """What `read_facts` reads."""
    lines = ({"prompt": f.prompt, "answer": f.answer, "distractors": list(f.distractors), "entity": f.entity} for f in facts)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def margins(
    policy: Policy, facts: Sequence[Fact], system_prompt: str | None, *, reference: bool, progress: Progress | None = None
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """For each fact, log-likelihood of the right answer minus that of its likeliest distractor, in nats, at temperature 1."""
    owners, replies = [], []
    for index, fact in enumerate(facts):
        for text in (fact.answer, *fact.distractors):
            owners.append(index)
            replies.append(policy.reply([{"role": "user", "content": fact.prompt}], system_prompt, text, True))
    order = sorted(range(len(replies)), key=lambda i: len(replies[i].prompt) + len(replies[i].tokens))
    total = np.zeros(len(replies))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        with torch.no_grad():
            logprobs_BT, mask_BT = policy.logprobs([replies[i] for i in batch], 1.0, reference=reference)
        total[batch] = (logprobs_BT * mask_BT).sum(1).double().numpy()
        if progress:
            progress("facts of the base" if reference else "facts of the candidate", min(1.0, (start + BATCH) / len(order)))
    right, wrong = np.full(len(facts), -math.inf), np.full(len(facts), -math.inf)
    previous = -1
    for owner, value in zip(owners, total, strict=True):
        if owner != previous:
            right[owner], previous = value, owner
        else:
            wrong[owner] = max(wrong[owner], value)
    gap_N: np.ndarray[tuple[int], np.dtype[np.float64]] = right - wrong
    return gap_N


@dataclass(frozen=True)
class FactsResult:
    """Paired figures; differences are candidate minus base. Points are percentage points."""

    n: int
    base: float
    candidate: float
    diff: float
    low: float
    """Lower bound of the difference in accuracy, one-sided 95 %."""
    discordant: float
    """Share of items on which base and candidate differ."""
    margin_change_nats: float
    margin_points: float
    certifies_points: float
    """Smallest margin that this set certifies 80 % of the time for a candidate that changed nothing on average."""

    @property
    def words(self) -> str:
        verdict = "can" if self.certifies_points <= self.margin_points else "cannot"
        return (
            f"{self.n} items: {self.base:.1%} before, {self.candidate:.1%} after, at worst {self.low:+.1%}; "
            f"this many items {verdict} certify {self.margin_points:g} points (they certify {self.certifies_points:.1f})"
        )


def compare(
    base_N: np.ndarray[tuple[int], np.dtype[np.float64]],
    candidate_N: np.ndarray[tuple[int], np.dtype[np.float64]],
    entities: Sequence[str],
    *,
    margin_points: float,
    seed: int = 0,
) -> FactsResult:
    """Paired comparison of two sets of margins. Raises InvalidInput for no items.

    What n items can certify: (1.645 + 0.842)·sqrt(discordance / n), with a discordance of at least 5 %, which an
    unharmed model shows; the classical sample size for non-inferiority of paired shares at 80 % power.
    """
    if len(base_N) == 0:
        raise InvalidInput("facts: 0 items, at least 1 is needed", field="facts")
    difference_N = (candidate_N > 0).astype(float) - (base_N > 0).astype(float)
    names, group_N = np.unique(np.array(entities), return_inverse=True)
    sums_G = np.bincount(group_N, weights=difference_N)
    sizes_G = np.bincount(group_N).astype(float)
    drawn = np.random.default_rng(seed).integers(len(names), size=(BOOTSTRAPS, len(names)))
    low = float(np.quantile(sums_G[drawn].sum(1) / sizes_G[drawn].sum(1), 0.05))
    discordant = float(np.abs(difference_N).mean())
    certifies = 100 * (ONE_SIDED_95 + POWER_80) * math.sqrt(max(discordant, 0.05) / len(base_N))
    return FactsResult(
        n=len(base_N),
        base=float((base_N > 0).mean()),
        candidate=float((candidate_N > 0).mean()),
        diff=float(difference_N.mean()),
        low=low,
        discordant=discordant,
        margin_change_nats=float((candidate_N - base_N).mean()),
        margin_points=margin_points,
        certifies_points=certifies,
    )
