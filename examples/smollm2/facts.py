"""Common knowledge with hard distractors: another thing of the same kind, in the same sentence.

Groups hold things that are easily confused (capitals of one continent, animals' young, ...); the distractors of an item
are the other answers of its group.
"""

from __future__ import annotations

from examples.base import FactItem

DISTRACTORS = 3

# Question | statement with {v} for the value, then groups of "thing=value", one group a line; _ stands for a space.
_SUITES = (
    (
        "What is the capital of {t}?",
        "The capital of {t} is {v}.",
        """
        France=Paris Spain=Madrid Italy=Rome Germany=Berlin Portugal=Lisbon Austria=Vienna Greece=Athens Poland=Warsaw
        Norway=Oslo Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Iceland=Reykjavik Ireland=Dublin
        Hungary=Budapest Romania=Bucharest Bulgaria=Sofia Serbia=Belgrade Croatia=Zagreb Ukraine=Kyiv
        Japan=Tokyo China=Beijing Thailand=Bangkok Vietnam=Hanoi Mongolia=Ulaanbaatar Indonesia=Jakarta
        India=New_Delhi Nepal=Kathmandu Pakistan=Islamabad Bangladesh=Dhaka Afghanistan=Kabul Iran=Tehran Iraq=Baghdad
        Egypt=Cairo Kenya=Nairobi Ethiopia=Addis_Ababa Ghana=Accra Senegal=Dakar Tunisia=Tunis Uganda=Kampala
        Peru=Lima Chile=Santiago Argentina=Buenos_Aires Colombia=Bogota Venezuela=Caracas Ecuador=Quito Uruguay=Montevideo
        Canada=Ottawa Cuba=Havana Jamaica=Kingston Australia=Canberra
        """,
    ),
    (
        "What is the chemical symbol for {t}?",
        "The chemical symbol for {t} is {v}.",
        """
        gold=Au silver=Ag copper=Cu aluminium=Al platinum=Pt
        iron=Fe lead=Pb tin=Sn zinc=Zn nickel=Ni
        hydrogen=H helium=He oxygen=O nitrogen=N carbon=C
        sodium=Na potassium=K calcium=Ca magnesium=Mg lithium=Li
        """,
    ),
    (
        "What is a young {t} called?",
        "A young {t} is called a {v}.",
        """
        dog=puppy cat=kitten horse=foal cow=calf sheep=lamb goat=kid
        goose=gosling duck=duckling swan=cygnet hen=chick kangaroo=joey frog=tadpole
        """,
    ),
    (
        "In which country is {t}?",
        "{t} is in {v}.",
        """
        Barcelona=Spain Munich=Germany Venice=Italy Marseille=France Krakow=Poland Porto=Portugal
        Osaka=Japan Shanghai=China Mumbai=India Busan=South_Korea Karachi=Pakistan Hanoi=Vietnam
        """,
    ),
    (
        "Which colour do {t} have?",
        "The colour of {t} is {v}.",
        """
        ripe_bananas=yellow strawberries=red carrots=orange cucumbers=green blueberries=blue snowflakes=white
        """,
    ),
)


def facts() -> list[FactItem]:
    """Every item, in the order of the data."""
    items = []
    for question, statement, data in _SUITES:
        for group in data.strip().splitlines():
            pairs = [tuple(text.replace("_", " ").split("=")) for text in group.split()]
            for index, (thing, value) in enumerate(pairs):
                # The next ones of the group, around its end, so that each value is a distractor equally often.
                others = [pairs[(index + step) % len(pairs)][1] for step in range(1, DISTRACTORS + 1)]
                items.append(
                    FactItem(
                        prompt=question.format(t=thing),
                        answer=statement.format(t=thing, v=value),
                        distractors=tuple(statement.format(t=thing, v=other) for other in others),
                        entity=thing,
                    )
                )
    return items
