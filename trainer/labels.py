"""What people said, as tensors: answers with their features, choices and thumbs that point at them.

`from_snapshot` reads a snapshot's rows, drops what cannot train and names it, and refuses what would teach nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from feedback import files
from feedback.errors import TrainingRefused
from trainer.likelihood import BOTH_BAD, DOWN, TIE, UP, A, B
from trainer.reply import Reply

if TYPE_CHECKING:
    from feedback.snapshot import Row
    from trainer.policy import Policy

Progress = Callable[[str, float], None]
"""What is being done, and which share of it is done, in [0, 1]."""

FEATURE_BATCH = 16
CHOICES = {"a": A, "b": B, "tie": TIE, "both_bad": BOTH_BAD}
THUMBS = {"up": UP, "down": DOWN}


@dataclass(frozen=True)
class Choices:
    """One row a comparison; all of shape N."""

    first: Tensor
    """Index of the answer on side a."""
    second: Tensor
    outcomes: Tensor
    """Columns of `likelihood.choice_logprobs`."""
    raters: Tensor
    rejectable: Tensor
    """Whether "both bad" was offered; imported pairs have no such button."""

    def __len__(self) -> int:
        return len(self.outcomes)

    def where(self, keep: Tensor) -> Choices:
        return Choices(self.first[keep], self.second[keep], self.outcomes[keep], self.raters[keep], self.rejectable[keep])


@dataclass(frozen=True)
class Thumbs:
    """One row a thumb; all of shape N."""

    answers: Tensor
    outcomes: Tensor
    raters: Tensor

    def __len__(self) -> int:
        return len(self.outcomes)

    def where(self, keep: Tensor) -> Thumbs:
        return Thumbs(self.answers[keep], self.outcomes[keep], self.raters[keep])


@dataclass(frozen=True)
class Answer:
    """One rated answer, once for all who rated it."""

    prompt: int
    text: str
    finished: bool
    tokens: int


@dataclass(frozen=True)
class Labels:
    """Features of answers and prompts, and the ratings. Answers and prompts stay when ratings are selected."""

    features_ND: Tensor
    prompts_N: Tensor
    """Index of each answer's prompt."""
    prompt_features_QD: Tensor
    choices: Choices
    thumbs: Thumbs
    raters: tuple[str, ...]
    cohorts: tuple[tuple[str, ...], ...] = ()
    """Of each rater."""
    weights_U: Tensor | None = None
    """Of each rater's ratings, in [0, 1]; None: all count in full."""
    answers: tuple[Answer, ...] = ()
    replies: tuple[Reply, ...] = ()
    """The answers as tokens, for a reward model that reads them itself."""
    prompts: tuple[str, ...] = ()
    """Last message of each prompt, for people to read."""
    warnings: tuple[str, ...] = ()
    """What was dropped or is doubtful; goes into the adapter's evidence."""

    @property
    def count(self) -> int:
        """How many ratings."""
        return len(self.choices) + len(self.thumbs)

    def select(self, choices: Tensor, thumbs: Tensor) -> Labels:
        """Only the ratings that the boolean masks name."""
        return replace(self, choices=self.choices.where(choices), thumbs=self.thumbs.where(thumbs))

    def where_prompt(self, keep_Q: Tensor) -> Labels:
        """Only ratings of the prompts for which `keep_Q` holds."""
        return self.select(keep_Q[self.prompts_N[self.choices.first]], keep_Q[self.prompts_N[self.thumbs.answers]])

    def where_rater(self, keep_U: Tensor) -> Labels:
        """Only ratings by the raters for whom `keep_U` holds."""
        return self.select(keep_U[self.choices.raters], keep_U[self.thumbs.raters])

    def shuffled(self, seed: int) -> Labels:
        """The control: sides of choices and values of thumbs permuted among ratings of their kind, so nothing can be learned."""
        generator = torch.Generator().manual_seed(seed)
        # A permutation alone would keep "a" and "b" attached to the sides; swapping by coin takes the rest of the meaning.
        swap = torch.rand(len(self.choices), generator=generator) < 0.5
        # Where "both bad" was not offered it must not land, so each kind of choice is permuted by itself.
        outcomes = self.choices.outcomes.clone()
        for kind in (self.choices.rejectable, ~self.choices.rejectable):
            outcomes[kind] = outcomes[kind][torch.randperm(int(kind.sum()), generator=generator)]
        flipped = torch.where(outcomes == A, B, torch.where(outcomes == B, A, outcomes))
        thumbs = self.thumbs.outcomes[torch.randperm(len(self.thumbs), generator=generator)]
        return replace(
            self,
            choices=replace(self.choices, outcomes=torch.where(swap, flipped, outcomes)),
            thumbs=replace(self.thumbs, outcomes=thumbs),
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {"features": self.features_ND, "prompts": self.prompts_N, "prompt_features": self.prompt_features_QD}
        named |= {} if self.weights_U is None else {"weights": self.weights_U}
        choices = {f"choices.{name}": value for name, value in vars(self.choices).items()}
        return named | choices | {f"thumbs.{name}": value for name, value in vars(self.thumbs).items()}

    def save(self, path: Path) -> None:
        """One safetensors file, atomically; the people-readable parts are in its header."""
        words = ("raters", "cohorts", "prompts", "warnings")
        about = {name: getattr(self, name) for name in words} | {"answers": [vars(answer) for answer in self.answers]}
        asked = {answer.prompt: reply.prompt for answer, reply in zip(self.answers, self.replies, strict=False)}
        about |= {"asked": list(asked.items()), "said": [reply.tokens for reply in self.replies]}
        content = save({name: value.contiguous() for name, value in self._tensors().items()}, metadata={"about": json.dumps(about)})
        files.replace(path, content)

    @classmethod
    def load(cls, path: Path) -> Labels:
        """What `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        answers, asked = tuple(Answer(**answer) for answer in about["answers"]), dict(about["asked"])
        said = zip(answers, about["said"], strict=False)
        return cls(
            features_ND=tensors["features"],
            prompts_N=tensors["prompts"],
            prompt_features_QD=tensors["prompt_features"],
            choices=Choices(**part("choices.")),
            thumbs=Thumbs(**part("thumbs.")),
            raters=tuple(about["raters"]),
            cohorts=tuple(map(tuple, about["cohorts"])),
            weights_U=tensors.get("weights"),
            answers=answers,
            replies=tuple(Reply(tuple(asked[answer.prompt]), tuple(tokens), answer.finished) for answer, tokens in said),
            prompts=tuple(about["prompts"]),
            warnings=tuple(about["warnings"]),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over everything that a fit depends on."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            sha.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        sha.update("\0".join(self.raters).encode())
        return sha.hexdigest()


def features_of(policy: Policy, replies: Sequence[Reply], progress: Progress | None = None, what: str = "features") -> Tensor:
    """Frozen features of many replies, N x D, in their order; batches hold similar lengths, so that little is padding."""
    order = sorted(range(len(replies)), key=lambda i: len(replies[i].prompt) + len(replies[i].tokens))
    rows: list[Tensor | None] = [None] * len(replies)
    for start in range(0, len(order), FEATURE_BATCH):
        batch = order[start : start + FEATURE_BATCH]
        for index, row_D in zip(batch, policy.features([replies[i] for i in batch]), strict=True):
            rows[index] = row_D
        if progress:
            progress(what, min(1.0, (start + FEATURE_BATCH) / len(order)))
    return torch.stack([row_D for row_D in rows if row_D is not None])


def usable(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows that can train, and why others cannot."""
    kept, dropped = [], Counter[str]()
    for row in rows:
        answers = [row.answer_a] if row.kind == "thumb" else [row.answer_a, row.answer_b or ""]
        if not all(answer.strip() for answer in answers):
            dropped["an answer is empty"] += 1
        elif row.kind == "choice" and row.answer_a == row.answer_b:
            dropped["both answers are the same text"] += 1
        elif row.outcome not in (THUMBS if row.kind == "thumb" else CHOICES):
            dropped[f"outcome {row.outcome!r} is unknown"] += 1
        else:
            kept.append(row)
    return kept, [f"{count} of {len(rows)} ratings dropped: {reason}" for reason, count in sorted(dropped.items())]


def check(rows: Sequence[Row], *, allow_single_rater: bool) -> list[str]:
    """Warnings about a set of ratings. Raises TrainingRefused where it can teach nothing, naming what is missing."""
    kept, warnings = usable(rows)
    if not kept:
        raise TrainingRefused(
            f"labels: {len(rows)} ratings, 0 of them can train; at least 1 thumb up and 1 down, or 1 choice, are needed", field="labels"
        )
    outcomes = Counter(row.outcome for row in kept)
    if outcomes["a"] + outcomes["b"] == 0 and not (outcomes["up"] and outcomes["down"]):
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        raise TrainingRefused(f"labels: one-sided, all say the same ({said}); ratings for and against are needed", field="labels")
    raters = {row.rater for row in kept}
    imported = all(row.source == "import" for row in kept)
    if len(raters) == 1 and not imported:
        if not allow_single_rater:
            raise TrainingRefused(
                "labels: all ratings are one rater's, at least 2 raters are needed; "
                "set reward_model.allow_single_rater for an adapter that serves that rater only",
                field="labels",
            )
        warnings.append("all ratings are one rater's: this adapter serves that rater only")
    verdicts: dict[tuple[str, ...], set[str]] = {}
    for row in kept:
        prompt = json.dumps(row.prompt, sort_keys=True)
        if row.kind == "thumb":
            verdicts.setdefault((row.rater, prompt, row.answer_a), set()).add(row.outcome)
        elif row.outcome in ("a", "b"):
            low, high = sorted((row.answer_a, row.answer_b or ""))
            winner = row.answer_a if row.outcome == "a" else row.answer_b or ""
            verdicts.setdefault((row.rater, prompt, low, high), set()).add(winner)
    contradictions = sum(len(said) > 1 for said in verdicts.values())
    if contradictions:
        warnings.append(f"{contradictions} of {len(verdicts)} judgements are contradicted by the same rater")
    return warnings


def from_snapshot(
    rows: Sequence[Row], policy: Policy, system_prompt: str | None, *, allow_single_rater: bool = False, progress: Progress | None = None
) -> Labels:
    """Tokenise what was rated as it was served, and take the features. Raises TrainingRefused, see `check`."""
    warnings = check(rows, allow_single_rater=allow_single_rater)
    kept, _ = usable(rows)
    prompts: dict[str, int] = {}
    answers: dict[tuple[int, str, bool], int] = {}
    raters: dict[str, int] = {}
    cohorts: list[tuple[str, ...]] = []
    choices: list[tuple[int, int, int, int, bool]] = []
    thumbs: list[tuple[int, int, int]] = []
    for row in kept:
        prompt = prompts.setdefault(json.dumps(row.prompt, sort_keys=True), len(prompts))
        rater = raters.setdefault(row.rater, len(raters))
        if rater == len(cohorts):
            cohorts.append(tuple(row.cohorts))
        first = answers.setdefault((prompt, row.answer_a, row.finish_a != "length"), len(answers))
        if row.kind == "thumb":
            thumbs.append((first, THUMBS[row.outcome], rater))
        else:
            second = answers.setdefault((prompt, row.answer_b or "", row.finish_b != "length"), len(answers))
            choices.append((first, second, CHOICES[row.outcome], rater, row.source != "import"))
    messages = [json.loads(prompt) for prompt in prompts]
    replies = [policy.reply(messages[prompt], system_prompt, text, finished) for prompt, text, finished in answers]
    # Thresholds are what the prompts' features explain; choices that could not reject both have none.
    thresholded = bool(thumbs) or any(rejectable for *_, rejectable in choices)
    starts = [policy.reply(message, system_prompt, "", False) for message in messages] if thresholded else []
    features = features_of(policy, [*replies, *starts], progress, "features of rated answers")
    first_N, second_N, outcome_N, rater_N, rejectable_N = torch.tensor(choices, dtype=torch.long).reshape(-1, 5).T.contiguous().unbind()
    rated_N, thumb_N, by_N = torch.tensor(thumbs, dtype=torch.long).reshape(-1, 3).T.contiguous().unbind()
    return Labels(
        features_ND=features[: len(replies)],
        prompts_N=torch.tensor([prompt for prompt, _, _ in answers]),
        prompt_features_QD=features[len(replies) :] if thresholded else torch.zeros(len(messages), features.shape[1]),
        choices=Choices(first_N, second_N, outcome_N, rater_N, rejectable_N.bool()),
        thumbs=Thumbs(rated_N, thumb_N, by_N),
        raters=tuple(raters),
        cohorts=tuple(cohorts),
        answers=tuple(Answer(p, text, done, len(reply.tokens)) for (p, text, done), reply in zip(answers, replies, strict=True)),
        replies=tuple(replies),
        prompts=tuple(str(message[-1].get("content", "")) for message in messages),
        warnings=tuple(warnings),
    )
