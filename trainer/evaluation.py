"""Is the candidate better, and what else changed? Answers of base, stable and candidate to prompts that nobody rated.

Everything is sampled at the serving temperature, because the policy is the distribution at that temperature. A gain is a
mean over prompts with the prompt as the unit. Everybody is judged by one `Judge`; `evaluate` returns the body of the
attestation `evaluation`, which the gates judge, and the details that only the report shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deploy.gates import counts
from feedback.errors import TrainingRefused
from trainer.held_out import MATCHED_LENGTHS, centred_correlation, clustered_mean, ends
from trainer.labels import Answer, Progress, features_of
from trainer.reward_model import RewardModel
from trainer.score import Scorer
from trainer.tastes import properties

if TYPE_CHECKING:
    from trainer.policy import Policy
    from trainer.reply import Reply

Messages = list[dict[str, Any]]

SAMPLE_BATCH = 64
READ = 20
"""Answers drawn at random, and as many of the worst, that a person may read."""
LONGEST = 600
"""Characters of one that are kept."""
TONE = ("lists", "questions", "exclamations", "hedging", "numbers")
"""Of `tastes.properties`."""
POSITIONS = 64
"""Token positions for which the KL is reported one by one."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the same for everybody who is compared."""

    system_prompt: str | None
    temperature: float
    max_tokens: int
    samples: int
    seed: int


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of all texts by their count (Li et al. 2016): 1 where nothing is ever said twice."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def sample(
    policy: Policy,
    prompts: Sequence[str | Messages],
    how: Sampling,
    *,
    reference: bool,
    temperature: float | None = None,
    progress: Progress | None = None,
    what: str = "answers",
) -> list[Reply]:
    """`how.samples` answers to each prompt; those to one prompt lie together. The same seed gives the same answers."""
    asked = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    encoded = [policy.encode(messages, how.system_prompt) for messages in asked for _ in range(how.samples)]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), SAMPLE_BATCH):
        batch = order[start : start + SAMPLE_BATCH]
        with policy.reference() if reference else nullcontext():
            drawn = policy.sample(
                [encoded[i] for i in batch],
                max_tokens=how.max_tokens,
                temperature=temperature or how.temperature,
                seed=how.seed + start,
            )
        replies.update(zip(batch, drawn, strict=True))
        if progress:
            progress(what, min(1.0, (start + SAMPLE_BATCH) / len(order)))
    return [replies[i] for i in range(len(encoded))]


def kl_by_position(policy: Policy, replies: Sequence[Reply], temperature: float) -> tuple[Tensor, Tensor]:
    """log pi - log pi_ref of every token, N x T, and the mask. The sum over a reply's tokens estimates its KL in nats (k1)."""
    gaps, masks = [], []
    for start in range(0, len(replies), 16):
        batch = list(replies[start : start + 16])
        with torch.no_grad():
            new_BT, mask_BT = policy.logprobs(batch, temperature)
            old_BT, _ = policy.logprobs(batch, temperature, reference=True)
        gaps.append((new_BT - old_BT) * mask_BT)
        masks.append(mask_BT)
    width = max(gap.shape[1] for gap in gaps)

    def widened(rows: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(row.float(), (0, width - row.shape[1])) for row in rows])

    return widened(gaps), widened(masks)


def gain(scores_N: Tensor, other_N: Tensor, samples: int) -> dict[str, float | None]:
    """Mean over prompts of the difference of mean scores, with the prompt as the unit."""
    gains_P = (scores_N - other_N).reshape(-1, samples).mean(1)
    mean, low, high = clustered_mean(gains_P, torch.arange(len(gains_P)))
    low_end, high_end = ends(low, high)
    return {"mean": mean, "low": low_end, "high": high_end, "n": len(gains_P)}


@dataclass(frozen=True)
class Answers:
    """Answers of one policy to the held-out prompts, and what can be counted in them. Those to one prompt lie together."""

    replies: list[Reply]
    texts: list[str]
    scores_N: Tensor
    figures: dict[str, float]
    features_ND: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """Frozen ones."""

    @property
    def lengths_N(self) -> Tensor:
        """Tokens of each answer."""
        return torch.tensor([len(reply.tokens) for reply in self.replies]).float()


@dataclass(frozen=True)
class Judge:
    """What is the same for everybody who is compared: held-out prompts, how answers are drawn, base's answers and the score."""

    prompts: Sequence[str]
    how: Sampling
    base: Answers
    scorer: Scorer
    progress: Progress | None = None

    @classmethod
    def of(
        cls, policy: Policy, model: RewardModel, prompts: Sequence[str], how: Sampling, clip: float, progress: Progress | None = None
    ) -> Judge:
        """Of any policy on the base. The base's answers define each prompt's zero, and gains are in units of its sd. All answers are
        scored alike, those of the base too, so that a candidate that says the same gains exactly nothing.

        Raises TrainingRefused without held-out prompts.
        """
        if not prompts:
            raise TrainingRefused("evaluation: 0 held-out prompts, at least 1 is needed; name a file in cycle.held_out", field="held_out")
        replies = sample(policy, prompts, how, reference=True, progress=progress, what="answers of the base")
        features_ND = features_of(policy, replies, progress, "scores of base")
        scorer = Scorer.fit(model, replies, features_ND, clip)
        base = _counted(policy, prompts, how.samples, replies, scorer(replies, features_ND))
        return cls(prompts, how, replace(base, features_ND=features_ND), scorer, progress)

    def answers(self, policy: Policy, name: str, stream: int = 0) -> Answers:
        """This policy's own. Those of another `stream` are drawn independently."""
        how = replace(self.how, seed=self.how.seed + stream)
        replies = sample(policy, self.prompts, how, reference=False, progress=self.progress, what=f"answers of {name}")
        features_ND = features_of(policy, replies, self.progress, f"scores of {name}")
        found = _counted(policy, self.prompts, how.samples, replies, self.scorer(replies, features_ND))
        return replace(found, features_ND=features_ND)


def _counted(policy: Policy, prompts: Sequence[str], samples: int, replies: list[Reply], scores_N: Tensor) -> Answers:
    texts = [policy.decode(reply.tokens) for reply in replies]
    asked = [prompt for prompt in prompts for _ in range(samples)]
    n = len(texts)
    figures = {
        "length": sum(len(reply.tokens) for reply in replies) / n,
        "words": sum(len(text.split()) for text in texts) / n,
        "finished": sum(reply.finished for reply in replies) / n,
        **{name: sum(map(count, asked, texts)) / n for name, count in counts().items()},
        "distinct_2": distinct(texts, 2),
        "score": float(scores_N.mean()),
    }
    return Answers(replies, texts, scores_N, figures)


def kl_of(policy: Policy, replies: Sequence[Reply], temperature: float) -> dict[str, Any]:
    """KL of a policy's own replies to the reference, in nats a reply and by token position.

    What a reply that was cut off would have gone on with is not in its sum, so those that ended by themselves stand alone, too.
    """
    gap_NT, mask_NT = kl_by_position(policy, replies, temperature)
    finished_N = torch.tensor([reply.finished for reply in replies])
    per_reply_N = gap_NT.sum(1)
    positions = (gap_NT.sum(0) / mask_NT.sum(0).clamp(min=1))[:POSITIONS]
    return {
        "all_replies": float(per_reply_N.mean()),
        "finished_replies": float(per_reply_N[finished_N].mean()) if bool(finished_N.any()) else None,
        "finished": int(finished_N.sum()),
        "by_position": [round(float(value), 5) for value in positions],
    }


def evaluate(
    judge: Judge, candidate: Policy, stable: Policy | None, probes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], Answers]:
    """Body of the attestation, without facts and budget, details, and the candidate's answers. `stable` None: stable is the base."""
    how, base = judge.how, judge.base
    new = judge.answers(candidate, "candidate")
    old = base if stable is None else judge.answers(stable, "stable")
    answers = {"base": base, "candidate": new} | ({} if stable is None else {"stable": old})
    kl = kl_of(candidate, new.replies, how.temperature)
    warm = kl
    if how.temperature != 1.0:
        warm = kl_of(candidate, sample(candidate, judge.prompts, how, reference=False, temperature=1.0), 1.0)
    kl["at_temperature_1"] = warm["all_replies"]
    matched = length_matched_win(new, base, how.samples)
    paired = ("length", "finished", *counts())
    tones = {which: _tone(found) for which, found in (("base", base), ("stable", old), ("candidate", new))}
    body: dict[str, Any] = {
        "reward_gain_base": gain(new.scores_N, base.scores_N, how.samples),
        "reward_gain_stable": gain(new.scores_N, old.scores_N, how.samples),
        "kl_nats": kl["all_replies"],
        "kl_finished_nats": kl["finished_replies"],
        "finished_replies": kl["finished"],
        "kl_nats_at_1": kl["at_temperature_1"],
        **{name: {which: found.figures[name] for which, found in (("base", base), ("stable", old), ("candidate", new))} for name in paired},
        "tone": {name: {which: tone[name] for which, tone in tones.items()} for name in tones["base"]},
        "length_matched_win": matched,
        "answers": to_read(judge.prompts, old, new, how),
        "probes": _probes(candidate, stable, probes, how),
    }
    details: dict[str, Any] = {
        "figures": {name: found.figures for name, found in answers.items()},
        "kl": kl,
        "length_share_of_score": _length_correlation(base.lengths_N, base.scores_N, how.samples),
        "samples": how.samples,
        "temperature": how.temperature,
        "examples": [
            {"prompt": prompt, **{name: found.texts[i * how.samples] for name, found in answers.items()}}
            for i, prompt in enumerate(judge.prompts)
        ][:24],
    }
    return body, details, new


def _tone(found: Answers) -> dict[str, float]:
    """Means of what tastes are about, beyond the figures that gates judge."""
    rows = [properties(Answer(0, text, True, 0)) for text in found.texts]
    return {name: sum(row[name] for row in rows) / len(rows) for name in TONE}


def to_read(prompts: Sequence[str], old: Answers, new: Answers, how: Sampling) -> dict[str, Any]:
    """For people: `READ` of the candidate's answers drawn at random, and those that score lowest beside stable's to the same prompt.

    The draw depends on the seed and the number of answers alone, so that two adapters that were asked the same show the same.
    """
    count = len(new.texts)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(how.seed))[:READ].tolist()
    # Stable's sample beside it is as random as the candidate's, so the mean of stable's scores to the prompt is the measure.
    stable_N = old.scores_N.reshape(-1, how.samples).mean(1).repeat_interleave(how.samples)
    change_N = new.scores_N - stable_N
    worst = change_N.argsort(stable=True)[:READ].tolist()

    def shown(i: int) -> dict[str, Any]:
        texts = {"prompt": prompts[i // how.samples], "stable": old.texts[i], "candidate": new.texts[i]}
        return {name: shortened(text) for name, text in texts.items()} | {"change": float(change_N[i])}

    return {"of": count, "random": [shown(i) for i in sorted(drawn)], "worst": [shown(i) for i in worst]}


def shortened(text: str) -> str:
    """Evidence is read by people and kept for ever."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def length_matched_win(new: Answers, base: Answers, samples: int) -> dict[str, float | None] | None:
    """How often the candidate's answer scores above one of base's that is as long, to the same prompt; equal scores count half.

    As long: the tokens differ by less than a tenth of the longer. Every answer is held against all of base's to its prompt. The prompt
    is the unit of the interval; None where no two answers are as long.
    """
    (new_PS, base_PS), (long_PS, short_PS) = (
        [each.reshape(-1, samples) for each in pair] for pair in ((new.scores_N, base.scores_N), (new.lengths_N, base.lengths_N))
    )
    longer_PSS = torch.maximum(long_PS[:, :, None], short_PS[:, None])
    matched_PSS = (long_PS[:, :, None] - short_PS[:, None]).abs() < MATCHED_LENGTHS * longer_PSS
    if not bool(matched_PSS.any()):
        return None
    margin_PSS = new_PS[:, :, None] - base_PS[:, None]
    wins_N = ((margin_PSS > 0).double() + (margin_PSS == 0).double() / 2)[matched_PSS]
    mean, low, high = clustered_mean(wins_N, matched_PSS.nonzero()[:, 0])
    low_end, high_end = ends(low, high, 0.0, 1.0)
    return {"value": mean, "low": low_end, "high": high_end, "n": len(wins_N)}


def _length_correlation(lengths_N: Tensor, scores_N: Tensor, samples: int) -> float:
    """Within prompts, of length and score among base answers: how much of the reward is length alone."""
    x, y = (v.reshape(-1, samples) - v.reshape(-1, samples).mean(1, keepdim=True) for v in (lengths_N, scores_N))
    return centred_correlation(x, y) or 0.0


def _probes(candidate: Policy, stable: Policy | None, probes: Sequence[str], how: Sampling) -> list[dict[str, str]]:
    """One answer of each policy to the operator's own questions."""
    if not probes:
        return []
    once = Sampling(how.system_prompt, how.temperature, how.max_tokens, 1, how.seed)
    texts = {
        "base": [candidate.decode(r.tokens) for r in sample(candidate, probes, once, reference=True)],
        "candidate": [candidate.decode(r.tokens) for r in sample(candidate, probes, once, reference=False)],
    }
    texts["stable"] = texts["base"] if stable is None else [stable.decode(r.tokens) for r in sample(stable, probes, once, reference=False)]
    return [{"prompt": probe, **{name: texts[name][i] for name in texts}} for i, probe in enumerate(probes)]
