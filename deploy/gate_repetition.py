"""Does it say the same words again and again?"""

from __future__ import annotations

from deploy.gates import Counted


def repetition(text: str) -> float:
    """Share of word triples that occurred before in the same text, in [0, 1]."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


GATES = (
    Counted(
        "repetition",
        "repetition",
        1,
        "max_repetition_rise",
        "read the report's answers and train again with a smaller KL budget",
        lambda prompt, answer: repetition(answer),
    ),
)
