"""Did the adapter forget anything? Right answers against their hardest distractors, base and candidate paired.

RLHF tunes behaviour, not facts, so facts are protected by a gate. An item counts as right where the log-likelihood of
its answer exceeds that of every distractor. The bound on the harm is one-sided 95 %, fixed n, bootstrapped by entity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from feedback.errors import InvalidInput
from trainer import distributed
from trainer.generation import prefill
from trainer.reply import Reply, pad

if TYPE_CHECKING:
    from trainer.labels import Progress
    from trainer.policy import Policy

Margins = np.ndarray[tuple[int], np.dtype[np.float64]]
"""A figure of each fact, in nats."""
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


def likelihoods(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[Sequence[str]],
    *,
    reference: bool,
    progress: Callable[[float], None] | None = None,
) -> list[list[float]]:
    """Log-likelihood in nats, at temperature 1, of each answer to its prompt, its end included. Each prompt is read once."""
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in answers])])
    total_N = torch.zeros(int(starts[-1]), device=policy.device)
    for done, (group, counts) in enumerate(distributed.turns(groups), start=1):
        rows = [(int(starts[i]) + k, Reply(prompts[i], _tokens(policy, text), True)) for i in group for k, text in enumerate(answers[i])]
        with policy.reference() if reference else nullcontext():
            sums_B = _sums(policy, [reply for _, reply in rows])
        if counts:
            total_N[torch.tensor([at for at, _ in rows], device=policy.device)] = sums_B
        if progress:
            progress(done / len(groups))
    distributed.total(total_N)
    found = total_N.cpu().double().tolist()
    return [found[int(starts[i]) : int(starts[i + 1])] for i in range(len(prompts))]


def _tokens(policy: Policy, text: str) -> tuple[int, ...]:
    return (*policy.tokenizer(text, add_special_tokens=False).input_ids, policy.eos_ids[0])


@torch.no_grad()
def _sums(policy: Policy, replies: list[Reply]) -> Tensor:
    """Log-likelihoods of replies, B, after one pass over their distinct prompts."""
    cache, mask_BS, last_B, first_BD = prefill(policy, [reply.prompt for reply in replies])
    ids_BT, mask_BT = (tensor.to(policy.device) for tensor in pad([reply.tokens for reply in replies], policy.pad_id))
    states_BTD = first_BD[:, None]
    if ids_BT.shape[1] > 1:
        steps_T = torch.arange(ids_BT.shape[1] - 1, device=policy.device)
        out = policy.trunk(
            input_ids=ids_BT[:, :-1],
            attention_mask=torch.cat([mask_BS, mask_BT[:, :-1]], 1),
            position_ids=last_B[:, None] + 1 + steps_T,
            past_key_values=cache,
            use_cache=True,
        )
        states_BTD = torch.cat([states_BTD, out.last_hidden_state], 1)
    return policy.token_logprobs(states_BTD.float(), mask_BT.float(), replies, 1.0).sum(1)


def margins(
    policy: Policy, facts: Sequence[Fact], system_prompt: str | None, *, reference: bool, progress: Progress | None = None
) -> Margins:
    """For each fact, log-likelihood of the right answer minus that of its likeliest distractor, in nats, at temperature 1."""
    what = "facts of the base" if reference else "facts of the candidate"
    found = likelihoods(
        policy,
        [policy.encode([{"role": "user", "content": fact.prompt}], system_prompt) for fact in facts],
        [(fact.answer, *fact.distractors) for fact in facts],
        reference=reference,
        progress=(lambda share: progress(what, share)) if progress else None,
    )
    return np.array([right - max(wrong) for right, *wrong in found])


@dataclass(frozen=True)
class FactsResult:
    """Paired figures; differences are candidate minus base. Points are percentage points."""

    n: int
    base: float
    candidate: float
    diff: float
    low: float | None
    """Lower bound of the difference in accuracy, one-sided 95 %; None where all items are about one entity."""
    discordant: float
    """Share of items on which base and candidate differ."""
    margin_change_nats: float
    margin_points: float
    certifies_points: float
    """Smallest margin that this set certifies 80 % of the time for a candidate that changed nothing on average."""

    @property
    def _worst(self) -> str:
        return "all about one thing, so without an interval" if self.low is None else f"at worst {self.low:+.1%}"

    @property
    def words(self) -> str:
        verdict = "can" if self.certifies_points <= self.margin_points else "cannot"
        return (
            f"{self.n} items: {self.base:.1%} before, {self.candidate:.1%} after, {self._worst}; "
            f"this many items {verdict} certify {self.margin_points:g} points (they certify {self.certifies_points:.1f})"
        )


def lower_bound(values_N: Margins, entities: Sequence[str], seed: int = 0) -> float | None:
    """Of the mean, one-sided 95 %: bootstrapped by entity, since items about one thing stand or fall together.

    A percentile of a bootstrap of G entities is too near by about sqrt((G - 1) / G) and by Student's quantile over the normal one
    (Hesterberg 2015, What teachers should know about the bootstrap), so its distance is stretched by both. None where G = 1.
    """
    names, group_N = np.unique(np.array(entities), return_inverse=True)
    count = len(names)
    if count < 2:
        return None
    sums_G = np.bincount(group_N, weights=values_N)
    sizes_G = np.bincount(group_N).astype(float)
    rng = np.random.default_rng(seed)
    # A row at a time: 2,000 rows of thousands of entities at once would be tens of MB.
    drawn = (rng.integers(count, size=count) for _ in range(BOOTSTRAPS))
    means = np.array([sums_G[row].sum() / sizes_G[row].sum() for row in drawn])
    mean = float(values_N.mean())
    stretch = float(student.ppf(0.95, count - 1)) / ONE_SIDED_95 * math.sqrt(count / (count - 1))
    return mean - (mean - float(np.quantile(means, 0.05))) * stretch


def compare(
    base_N: Margins,
    candidate_N: Margins,
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
    low = lower_bound(difference_N, entities, seed)
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
