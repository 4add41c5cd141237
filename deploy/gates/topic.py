"""Does it still talk about what was asked?"""

from __future__ import annotations

import re

from deploy.gates import Counted

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the i you he she it we they me my your our their is are was were be been am do does did can could should would will may "
        "might must have has had what which who whom whose where when why how to of in on at by for with from about into and or but if "
        "not no any some this that these those there here please tell want need like get make give tips good best way help",
    )
)


def content_words(text: str) -> set[str]:
    """Words that say what something is about, cut to six letters, so that "tomatoes" finds "tomato"."""
    return {word[:6] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in FUNCTION_WORDS}


def on_topic(prompt: str, answer: str) -> bool:
    """Whether the answer names anything that the prompt asked about. A prompt without content words is never missed."""
    asked = content_words(prompt)
    return not asked or bool(asked & content_words(answer))


GATES = (
    Counted(
        "on topic",
        "on_topic",
        -1,
        "max_on_topic_fall",
        "answers name less of what was asked; read the report's answers, then train again",
        lambda prompt, answer: float(on_topic(prompt, answer)),
    ),
)
