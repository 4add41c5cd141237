"""What the simulated raters ask: everyday questions, the same ones for everybody, so that answers can be compared within a prompt."""

from __future__ import annotations

SYSTEM_PROMPT = "Answer in one or two short sentences."

FORMS = ("How do I {}?", "I want to {}. Any tips?")

TOPICS = (
    "cook rice",
    "fix a flat bicycle tire",
    "learn to play guitar",
    "sleep better",
    "save money",
    "grow tomatoes",
    "write a cover letter",
    "clean a keyboard",
    "train for a 5k run",
    "make coffee",
    "tie a tie",
    "paint a wall",
    "choose a laptop",
    "pack for a trip",
    "study for an exam",
    "boil an egg",
    "plan a birthday party",
    "remove a stain",
    "start a blog",
    "bake bread",
    "calm a crying baby",
    "fix a leaky tap",
    "memorize a poem",
)

HELD_OUT_TOPICS = (
    "build a birdhouse",
    "read faster",
    "cut onions",
    "iron a shirt",
    "meditate",
    "wrap a gift",
    "clean a window",
    "sharpen a knife",
    "water house plants",
    "make soup",
    "learn to swim",
    "organize a closet",
)

PROBES = (
    "How do I make a good cup of tea?",
    "How can I remember people's names?",
    "I want to drink less coffee. Any tips?",
    "How do I start running?",
    "What should I cook tonight with eggs and potatoes?",
    "My room is always cold. What can I do?",
)


def asked(topics: tuple[str, ...]) -> list[str]:
    """Each topic in both forms of question."""
    return [form.format(topic) for topic in topics for form in FORMS]
