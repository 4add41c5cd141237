"""Does it answer in the language it was asked in? Where that cannot be told, it counts as the same."""

from __future__ import annotations

from deploy.gates import Counted
from deploy.texts import other_language

GATES = (
    Counted(
        "language",
        "language",
        1,
        "max_language_rise",
        "it answers in another language than it was asked in; read the report's answers, then train again",
        lambda prompt, answer: float(bool(other_language(prompt, answer))),
    ),
)
