"""PPO run again with another seed: how far the outcome is luck.

The first seed's adapter is the candidate, chosen before anybody looked, so that its evaluation stays unbiased. The others only
say how much would have been different.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.evaluation import Answers, gain
from trainer.held_out import centred_correlation

STRIDE = 1_000
"""Between the seeds of one cycle, so that cycles whose own seeds are neighbours share none."""


def seed_of(first: int, index: int) -> int:
    """The seed of a cycle's run number `index`."""
    return first + STRIDE * index


def folder_of(cycle: Path, index: int) -> Path:
    """Where that run keeps its checkpoint, its metrics and its adapter: the first in the cycle's own folder."""
    return cycle if index == 0 else cycle / f"seed-{index}"


@dataclass(frozen=True)
class Outcome:
    """What one seed led to."""

    seed: int
    answers: Answers
    kl_nats: float
    ended: dict[str, Any]
    """Its `ppo.json`."""


def gains_apart(first: Answers, other: Answers, base: Answers, samples: int) -> tuple[Tensor, Tensor]:
    """Each prompt's gain over base by two runs, P and P. Each is held against another half of base's answers, because a base answer
    that happened to be bad would otherwise raise both and pass for agreement.

    The first run's answers were drawn with base's random numbers, one by one, so that a base answer that happened to be good is one of
    the first run's, too. Only those count that share theirs with the base answers that they are held against: the rest would be the
    better, the more the other run's gain falls.
    """
    first_PS, other_PS, base_PS = (answers.scores_N.reshape(-1, samples) for answers in (first, other, base))
    return (first_PS - base_PS)[:, ::2].mean(1), other_PS.mean(1) - base_PS[:, 1::2].mean(1)


def compare(outcomes: Sequence[Outcome], base: Answers, samples: int) -> dict[str, Any]:
    """Every seed's figures, and for each further one how it differs from the first: in gain, and prompt by prompt.

    `correlation` is that of the prompts' gains and `opposite` the share of prompts that one improved and the other did not. Few
    answers a prompt are noise in both: it pulls the correlation towards 0 and the share towards a half, never the other way.
    """
    first = outcomes[0]
    runs = [
        {
            "seed": each.seed,
            "gain_base": gain(each.answers.scores_N, base.scores_N, samples),
            "kl_nats": each.kl_nats,
            "length": each.answers.figures["length"],
            "finished": each.answers.figures["finished"],
            "released": each.ended["released"],
            "stopped_because": each.ended["stopped_because"],
        }
        for each in outcomes
    ]
    against = []
    for other in outcomes[1:]:
        first_P, other_P = pair = gains_apart(first.answers, other.answers, base, samples)
        against.append(
            {
                "seed": other.seed,
                "difference": gain(other.answers.scores_N, first.answers.scores_N, samples),
                # Of two prompts the correlation is 1 or -1 whatever they say.
                "correlation": centred_correlation(*(x_P.double() - x_P.double().mean() for x_P in pair)) if len(first_P) > 2 else None,
                "opposite": float(((first_P > 0) != (other_P > 0)).double().mean()),
            }
        )
    return {"runs": runs, "against_first": against}


def words(found: dict[str, Any]) -> list[str]:
    """The disagreement for people, one line for each further seed."""
    first = found["runs"][0]
    lines = []
    for run, other in zip(found["runs"][1:], found["against_first"], strict=True):
        difference = other["difference"]
        interval = "" if difference["low"] is None else f" ({difference['low']:+.2f} to {difference['high']:+.2f})"
        alike = "" if other["correlation"] is None else f", gains of the prompts correlate {other['correlation']:+.2f}"
        lines.append(
            f"seed {run['seed']} gains {difference['mean']:+.2f} sd{interval} against seed {first['seed']}; "
            f"KL {run['kl_nats']:.1f} and {first['kl_nats']:.1f} nats, {run['length']:.0f} and {first['length']:.0f} tokens{alike}, "
            f"{other['opposite']:.0%} of prompts go opposite ways"
        )
    return lines


def undecided(found: dict[str, Any]) -> bool:
    """Whether a further seed's own gain over base is not surely above zero although the first one's is: then the first was lucky."""

    def sure(run: dict[str, Any]) -> bool:
        low = run["gain_base"]["low"]
        return low is not None and math.isfinite(low) and low > 0

    return sure(found["runs"][0]) and not all(map(sure, found["runs"][1:]))
