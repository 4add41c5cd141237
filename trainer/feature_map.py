"""From the backbone's features to those in which a score is linear.

Features are the state after a reply's last token and the mean of all its states. `last` standardises the first half, `linear`
both; `quadratic` adds squares and products of the strongest directions, so that a preference with an
optimum in the middle ("about three sentences") can be learned. Which one is used is decided by held-out likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("last", "linear", "quadratic")
LEAST_WITHIN = 0.1
"""A feature's sd within prompts is taken for at least this share of its whole sd. Where few prompts have several answers, or a feature
tells only prompts apart, it can be next to nothing by chance, and what is divided by it would be all that a score sees."""
DIRECTIONS = 16
"""Principal directions whose squares and products `quadratic` adds: 136 features."""


def _within(features_ND: Tensor, groups_N: Tensor) -> Tensor:
    """Features minus their group's mean; groups of one are left out, unless there is no other."""
    groups = int(groups_N.max()) + 1
    counts_G = torch.bincount(groups_N, minlength=groups)
    sums_GD = torch.zeros(groups, features_ND.shape[1], dtype=features_ND.dtype).index_add(0, groups_N, features_ND)
    centred_ND = features_ND - (sums_GD / counts_G.clamp(min=1)[:, None])[groups_N]
    several_N = counts_G[groups_N] > 1
    return centred_ND[several_N] if bool(several_N.any()) else features_ND - features_ND.mean(0)


@dataclass(frozen=True)
class FeatureMap:
    """Features of B x D in, float64 of B x P out; each block has a mean square of 1 within prompts."""

    kind: str
    mean_D: Tensor
    scale_D: Tensor
    directions_DK: Tensor
    """Principal directions of differences within prompts."""
    centres_K: Tensor
    products_mean: Tensor
    products_scale: Tensor

    @classmethod
    def fit(cls, kind: str, features_ND: Tensor, prompts_N: Tensor) -> FeatureMap:
        """Scales are those *within* prompts: what differs only between prompts cannot be compared by anybody."""
        features = features_ND.double()[:, : features_ND.shape[1] // 2 if kind == "last" else None]
        within = _within(features, prompts_N)
        mean = features.mean(0)
        whole = (features - mean).square().mean(0).sqrt()
        scale = torch.maximum(within.square().mean(0).sqrt(), LEAST_WITHIN * whole).clamp(min=1e-6)
        empty = torch.zeros(0, dtype=torch.float64)
        if kind != "quadratic":
            return cls(kind, mean, scale, torch.zeros(len(mean), 0, dtype=torch.float64), empty, empty, empty)
        standard = within / scale
        _, values, rows = torch.linalg.svd(standard, full_matrices=False)
        count = min(DIRECTIONS, len(values))
        # The sign of a singular vector is arbitrary; fix it, so that the same data gives the same bytes.
        top = rows[:count]
        top = top * top.gather(1, top.abs().argmax(1, keepdim=True)).sign()
        # Not whitened: products of strong directions stay larger, as in a polynomial kernel, and so cost the prior less.
        directions = top.T
        centres = ((features - mean) / scale @ directions).mean(0)
        half = cls(kind, mean, scale, directions, centres, empty, empty)
        products = half._products((features - mean) / scale)
        spread = _within(products, prompts_N).square().mean().sqrt().clamp(min=1e-6)
        return cls(kind, mean, scale, directions, centres, products.mean(0), spread)

    def _products(self, standard_BD: Tensor) -> Tensor:
        projected_BK = standard_BD @ self.directions_DK - self.centres_K
        upper = torch.triu_indices(projected_BK.shape[1], projected_BK.shape[1])
        return projected_BK[:, upper[0]] * projected_BK[:, upper[1]]

    def __call__(self, features_BD: Tensor) -> Tensor:
        standard_BD = (features_BD.double()[:, : len(self.mean_D)] - self.mean_D) / self.scale_D
        if self.kind != "quadratic":
            return standard_BD
        products_BK = (self._products(standard_BD) - self.products_mean) / self.products_scale
        # Both blocks get the same total variance, whatever their sizes.
        balance = (standard_BD.shape[1] / products_BK.shape[1]) ** 0.5
        return torch.cat([standard_BD, products_BK * balance], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` takes back."""
        names = ("mean_D", "scale_D", "directions_DK", "centres_K", "products_mean", "products_scale")
        return {f"map.{name}": getattr(self, name).contiguous() for name in names}

    @classmethod
    def from_tensors(cls, kind: str, tensors: dict[str, Tensor]) -> FeatureMap:
        return cls(kind, **{name.removeprefix("map."): value for name, value in tensors.items() if name.startswith("map.")})
