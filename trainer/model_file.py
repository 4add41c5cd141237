"""What every reward model has, whatever its kind: one safetensors file, the file's digest as its id, and the score of whole rows."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from feedback import files


class ModelFile(ABC):
    """Kinds of `RewardModel` add what they look at and how they score it."""

    about: dict[str, object]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that is in the file beside `about`."""

    @abstractmethod
    def mapped(self, features_BD: Tensor) -> Tensor:
        """As `RewardModel.mapped`."""

    @abstractmethod
    def score_mapped(self, mapped_BP: Tensor) -> tuple[Tensor, Tensor]:
        """As `RewardModel.score_mapped`."""

    def score(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of each answer's score, both of shape B, float64."""
        return self.score_mapped(self.mapped(features_BD))

    @cached_property
    def _bytes(self) -> bytes:
        tensors = {name: value.contiguous() for name, value in self.tensors().items()}
        content: bytes = save(tensors, metadata={"about": json.dumps(self.about, sort_keys=True)})
        return content

    @property
    def id(self) -> str:
        """SHA-256 of the saved file."""
        return hashlib.sha256(self._bytes).hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        files.replace(path, self._bytes)
