"""Does it say the same words again and again?"""

from __future__ import annotations

from deploy.gates import Counted
from deploy.texts import repetition

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
