"""The town: thirty places, thirteen attributes each, and the sentences that ask for and state them.

The town never changes; what people like (`world.py`) is drawn by seed. Values are drawn once with a fixed seed, so that
no attribute can be told from another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from examples.base import FactItem

NAMES = """
    Amaro Bellini Calypso Dorado Eldora Fiorella Galena Hestia Indigo Juniper Kestrel Lumina Marigold Nimbus Orsola Pavona Quimby
    Rosella Saffron Tamarind Umbria Valerian Willow Xenia Yarrow Zephyr Alcove Bramble Cinder Damson
""".split()

_NUMBERS = ["three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"]

VALUES: dict[str, list[str]] = {
    "kind": ["bakery", "cafe", "museum", "library", "hotel", "restaurant", "bookshop", "cinema", "garden", "pool"],
    "street": ["Mill", "Harbour", "Castle", "Church", "Bridge", "Market", "River", "Station", "Park", "Tower", "School", "Forest"],
    "opens": ["six", "seven", "eight", "nine", "ten", "eleven", "noon"],
    "closes": ["three", "four", "five", "six", "seven", "eight", "nine", "midnight"],
    "rest": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "price": _NUMBERS,
    "known": "bread tea cake paintings maps poems soup cheese films roses lamps honey clocks puppets chess coffee".split(),
    "owner": "Clara Bruno Emil Frida Greta Hugo Ines Jonas Karla Leon Mona Nils Olga Paul Rita Sven".split(),
    "near": ["fountain", "lighthouse", "square", "statue", "windmill", "canal", "theatre", "gate", "chapel", "well"],
    "door": ["red", "blue", "green", "yellow", "white", "black", "brown", "silver"],
    "music": ["jazz", "folk", "opera", "swing", "blues", "tango", "choral", "piano"],
    "animal": ["cat", "dog", "parrot", "goat", "owl", "tortoise", "rabbit", "hen"],
    "bus": _NUMBERS,
}

# Per attribute: questions, then statements. {n} is the place, {v} the value; a statement's subject is {s}: "Amaro" or "It".
QUESTIONS: dict[str, list[str]] = {
    "kind": ["What is {n}?", "What kind of place is {n}?", "Tell me about {n}."],
    "street": ["Where is {n}?", "Which street is {n} on?", "How do I find {n}?"],
    "opens": ["When does {n} open?", "What time does {n} open?", "How early can I visit {n}?"],
    "closes": ["When does {n} close?", "What time does {n} close?", "How late can I visit {n}?"],
    "rest": ["When is {n} closed?", "Which day is {n} closed?", "On which day does {n} rest?"],
    "price": ["How much is {n}?", "What does {n} cost?", "What is the price at {n}?"],
    "known": ["What is {n} known for?", "What is special at {n}?", "Why do people visit {n}?"],
    "owner": ["Who runs {n}?", "Who is the owner of {n}?", "Whose place is {n}?"],
    "near": ["What is near {n}?", "What can I see near {n}?", "What stands beside {n}?"],
    "door": ["What colour is the door of {n}?", "Which door is that of {n}?", "How do I know the door of {n}?"],
    "music": ["What music plays at {n}?", "Which music can I hear at {n}?", "What do they play at {n}?"],
    "animal": ["Which animal lives at {n}?", "Who greets the guests at {n}?", "Does an animal live at {n}?"],
    "bus": ["Which bus goes to {n}?", "How do I get to {n}?", "What bus do I take to {n}?"],
}
STATEMENTS: dict[str, str] = {
    "kind": "{s} is a {v}.",
    "street": "{s} is on {v} Street.",
    "opens": "{s} opens at {v}.",
    "closes": "{s} closes at {v}.",
    "rest": "{s} is closed on {v}.",
    "price": "{s} costs {v} coins.",
    "known": "{s} is known for {v}.",
    "owner": "{s} is run by {v}.",
    "near": "{s} is near the {v}.",
    "door": "{s} has a {v} door.",
    "music": "{s} plays {v} music.",
    "animal": "{s} keeps a {v}.",
    "bus": "{s} is reached by bus {v}.",
}
WISHES = ["Where can I find {v}?", "I am looking for {v}.", "Which place is known for {v}?"]

# How often people ask: the first places and attributes most. What is rarely asked is half known, as in any model.
ATTRIBUTES = tuple(VALUES)


@dataclass(frozen=True)
class Asked:
    """What a question asks for. `right` are the values that answer it, `all` those of the same attribute."""

    name: str | None
    attribute: str
    right: frozenset[str]
    every: frozenset[str]


@cache
def places() -> dict[str, dict[str, str]]:
    """Name -> attribute -> value, the same in every process."""
    rng = np.random.default_rng(20_240)
    town: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    for attribute, values in VALUES.items():
        spread = [values[i % len(values)] for i in range(len(NAMES))]
        for name, value in zip(NAMES, rng.permutation(spread), strict=True):
            town[name][attribute] = str(value)
    return town


def statement(name: str, attribute: str, value: str | None = None, subject: str | None = None) -> str:
    """ "Amaro opens at seven." With another value it is a distractor."""
    return STATEMENTS[attribute].format(s=subject or name, v=value or places()[name][attribute])


@cache
def questions() -> dict[str, Asked]:
    """Every question that the town knows, and what it asks for."""
    known: dict[str, Asked] = {}
    for name, values in places().items():
        for attribute, templates in QUESTIONS.items():
            asked = Asked(name, attribute, frozenset({values[attribute]}), frozenset(VALUES[attribute]))
            known.update({template.format(n=name): asked for template in templates})
    for value in VALUES["known"]:
        right = frozenset(name for name, values in places().items() if values["known"] == value)
        known.update({t.format(v=value): Asked(None, "wish", right, frozenset(NAMES)) for t in WISHES})
    return known


def facts() -> list[FactItem]:
    """One item for each place and attribute. Distractors belong to three other places, those of the same kind first."""
    town = places()
    items = []
    for name in NAMES:
        others = sorted((n for n in NAMES if n != name), key=lambda n: town[n]["kind"] != town[name]["kind"])
        for attribute in ATTRIBUTES:
            true = town[name][attribute]
            wrong = list(dict.fromkeys(town[other][attribute] for other in others if town[other][attribute] != true))[:3]
            items.append(
                FactItem(
                    prompt=QUESTIONS[attribute][0].format(n=name),
                    answer=statement(name, attribute),
                    distractors=tuple(statement(name, attribute, value) for value in wrong),
                    entity=name,
                )
            )
    return items
