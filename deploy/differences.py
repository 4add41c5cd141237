"""Two adapters side by side: what they are, what their raters preferred, what was measured, and what they say to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from deploy.card import Card, facts_of
from deploy.pages import percent, plain, signed

NONE = "–"
"""Where one of the two has nothing to show."""


@dataclass(frozen=True)
class Part:
    """One table: what, the first adapter's, the second's."""

    title: str
    rows: tuple[tuple[str, str, str], ...]


def differences(a: Card, b: Card) -> list[Part]:
    """Settings and verdicts only where they differ; figures and answers whole, because that they are equal is news too. No empty parts."""
    parts = [
        Part("Manifest", tuple(row for row in _beside(_manifest(a), _manifest(b)) if row[1] != row[2])),
        Part("Raters and how much they moved it", tuple(_beside(_raters(a), _raters(b)))),
        Part("Tastes", tuple(_beside(_tastes(a), _tastes(b)))),
        Part("Figures", tuple(_beside(_figures(a), _figures(b)))),
        Part("Verdicts", tuple(row for row in _beside(_verdicts(a), _verdicts(b)) if row[1] != row[2])),
        Part("Answers", tuple(_answers(a, b))),
    ]
    return [part for part in parts if part.rows]


def _beside(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*a, *b]):
        yield plain(name), plain(a.get(name, NONE)), plain(b.get(name, NONE))


def _manifest(card: Card) -> dict[str, str]:
    manifest = card.manifest.model_dump(mode="json", exclude={"files", "format"})
    return dict(_leaves("", manifest))


def _leaves(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in sorted(value.items()):
            yield from _leaves(f"{name}.{key}" if name else key, inner)
    else:
        yield name, NONE if value is None else str(value)


def _raters(card: Card) -> dict[str, str]:
    rows: dict[str, str] = {}
    if card.training is not None:
        ratings = card.training.reward_model
        rows["everybody"] = f"{ratings.raters} raters, {ratings.choices} choices, {ratings.thumbs} thumbs"
    influence = card.evaluation.influence if card.evaluation else None
    for each in influence.cohorts if influence else ():
        pull = f", pull {signed(each.pull.mean)} sd" if each.pull else ""
        rows[each.cohort] = f"{each.raters} raters, {each.ratings} ratings{pull}"
    return rows


def _tastes(card: Card) -> dict[str, str]:
    found = card.training.reward_model.tastes if card.training else ()
    return {f"{each.cohort}: {each.what}": f"{signed(each.correlation)}{'' if each.sure else ' (unsure)'}" for each in found}


def _figures(card: Card) -> dict[str, str]:
    if (found := card.evaluation) is None:
        return {}
    gains = {"against base": found.reward_gain_base, "against stable": found.reward_gain_stable}
    rows = {f"reward {which}": f"{signed(gain.mean)} sd" for which, gain in gains.items()}
    rows["KL to the base"] = f"{found.kl_nats:.1f} of {found.kl_budget_nats:.1f} nats"
    for name, words, change in found.figures():
        rows[words] = f"{change.candidate:.1f}" if name == "length" else percent(change.candidate, 1)
    rows |= {f"{name} an answer": f"{change.candidate:.2f}" for name, change in found.tone.items()}
    return rows | dict(facts_of(card))


def _verdicts(card: Card) -> dict[str, str]:
    last = card.rollouts[-1] if card.rollouts else None
    return {each.name: each.verdict + (" (overridden)" if each.overridden else "") for each in (last.verdicts if last else ())}


def _answers(a: Card, b: Card) -> Iterator[tuple[str, str, str]]:
    """To prompts that both were asked: the operator's own, and those drawn at random, which are the same draw for the same prompts."""
    left, right = _said(a), _said(b)
    for place, (prompt, said) in left.items():
        if place in right and right[place][0] == prompt:
            yield plain(prompt), plain(said), plain(right[place][1])


def _said(card: Card) -> dict[tuple[str, int], tuple[str, str]]:
    if card.evaluation is None:
        return {}
    asked = [(probe["prompt"], probe["candidate"]) for probe in card.evaluation.probes]
    drawn = [(each.prompt, each.candidate) for each in card.evaluation.answers.random] if card.evaluation.answers else []
    named = [(("probe", i), each) for i, each in enumerate(asked)] + [(("drawn", i), each) for i, each in enumerate(drawn)]
    return dict(named)
