"""Does it refuse more?"""

from __future__ import annotations

from deploy.gates import Counted
from deploy.texts import refuses

GATES = (
    Counted(
        "refusals",
        "refusal",
        1,
        "max_refusal_rise",
        "it refuses more; read the report's answers and rate refusals down",
        lambda prompt, answer: float(refuses(answer)),
    ),
)
