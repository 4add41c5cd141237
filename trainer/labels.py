"""What people said, as tensors: answers with their features, choices and thumbs that point at them.

`from_snapshot` reads a snapshot's rows, drops what cannot train and names it, and refuses what would teach nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from feedback.errors import TrainingRefused
from trainer.likelihood import A, B, BOTH_BAD, DOWN, TIE, UP

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
    answers: tuple[Answer, ...] = ()
    prompts: tuple[str, ...] = ()
    """Last message of each prompt, for people to read."""
    warnings: tuple[str, ...] = field(default=())

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
        outcomes = self.choices.outcomes[torch.randperm(len(self.choices), generator=generator)]
        flipped = torch.where(outcomes == A, B, torch.where(outcomes == B, A, outcomes))
        thumbs = self.thumbs.outcomes[torch.randperm(len(self.thumbs), generator=generator)]
        return replace(
            self,
            choices=replace(self.choices, outcomes=torch.where(swap, flipped, outcomes)),
            thumbs=replace(self.thumbs, outcomes=thumbs),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over everything that a fit depends on."""
        sha = hashlib.sha256()
        tensors = (self.features_ND, self.prompts_N, self.prompt_features_QD, *vars(self.choices).values(), *vars(self.thumbs).values())
        for tensor in tensors:
            sha.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        sha.update("\0".join(self.raters).encode())
        return sha.hexdigest()
