"""What the concierge read before it met anybody: dialogues with the right fact and a style drawn at random.

Guests often remark on an answer ("Friendly and brief.") before they ask on. People's texts are full of such remarks;
they are why a language model's hidden state at the end of an answer tells what the answer is like.
"""

from __future__ import annotations

import numpy as np

from examples.concierge.town import ATTRIBUTES, NAMES, QUESTIONS, VALUES, WISHES, places, statement

MAX_WORDS = 46
"""Words and punctuation marks of the longest answer in the corpus; with its end it fits max_tokens = 48."""

GREETINGS = ["Hello!", "Welcome!", "Good day.", "Hi there."]
HEDGES = ["I think", "I believe", "Perhaps"]
THANKS = ["Thank you for asking.", "Good question."]
RECOMMENDATIONS = ["I love it.", "It is my favourite.", "I go there every week."]
ALTERNATIVES = ["You may also like {o}.", "Many guests also visit {o}."]
ADVICE = ["Bring a coat.", "Come early.", "Please book ahead.", "Please ring the bell."]
WISHES_WELL = ["Enjoy your visit!", "Have fun!", "Have a good time."]
CLOSINGS = ["Can I help with more?", "Shall I say more?", "What else do you need?"]
DETAILS = [
    "The rooms are bright.", "The staff is kind.", "The chairs are soft.", "It smells of wood.", "Children like it.",
    "The view is wide.", "It is quiet inside.", "The walls are old.", "Music fills the air.", "The light is warm.",
    "Artists meet there.", "The floor is stone.", "Students read there.", "The roof is high.", "The queue is short.",
    "It was built long ago.",
]  # fmt: skip

# How likely each habit is in one answer, independent of the others.
RATES = {"greeting": 0.4, "hedge": 0.3, "thanks": 0.2, "recommend": 0.3, "alternative": 0.25, "advice": 0.3, "wish": 0.25, "closing": 0.3}
DETAIL_COUNTS = [0.2, 0.24, 0.22, 0.17, 0.11, 0.06]
FORMS = {"name": 0.5, "it": 0.25, "formal": 0.25}

REMARKS: dict[str, str] = {
    "greeting": "friendly", "hedge": "careful", "thanks": "grateful", "recommend": "personal", "alternative": "broad",
    "advice": "practical", "wish": "cordial", "closing": "curious", "it": "plain", "formal": "formal", "exclaim": "lively",
    "please": "polite",
}  # fmt: skip
DETAIL_REMARKS = ["bare", "brief", "fair", "full", "rich", "endless"]

Dialogue = list[dict[str, str]]
"""Messages in OpenAI's shape."""


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _part(rng: np.random.Generator, habits: set[str], habit: str, texts: list[str]) -> list[str]:
    """One of the texts where the answer has this habit."""
    return [_pick(rng, texts)] if habit in habits else []


def core(rng: np.random.Generator, name: str | None, attribute: str, value: str, form: str, hedge: bool) -> str:
    """The sentence that answers. A wish is answered with a place: `value` is then what the guest looks for, `name` the place."""
    if attribute == "wish":
        text = {"name": f"{name} is known for {value}.", "it": f"Go to {name}.", "formal": f"For {value}, visit {name}."}[form]
    else:
        assert name is not None
        subject = {"name": name, "it": "It", "formal": f"As for {name}, it"}[form]
        text = statement(name, attribute, value, subject)
    if hedge:
        first, _, rest = text.partition(" ")
        text = f"{_pick(rng, HEDGES)} {first if first in NAMES else first.lower()} {rest}"
    return text


def answer(rng: np.random.Generator, name: str | None, attribute: str, value: str) -> tuple[str, list[str]]:
    """An answer in a random style, and the remarks that a guest may make on it. At most MAX_WORDS words and marks."""
    while True:
        habits = {habit for habit, rate in RATES.items() if rng.random() < rate}
        form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
        count = int(rng.choice(len(DETAIL_COUNTS), p=DETAIL_COUNTS))
        other = _pick(rng, [n for n in NAMES if n != name])
        sentences = [
            *_part(rng, habits, "greeting", GREETINGS),
            *_part(rng, habits, "thanks", THANKS),
            core(rng, name, attribute, value, form, "hedge" in habits),
            *(DETAILS[i] for i in rng.permutation(len(DETAILS))[:count]),
            *_part(rng, habits, "recommend", RECOMMENDATIONS),
            *(text.format(o=other) for text in _part(rng, habits, "alternative", ALTERNATIVES)),
            *_part(rng, habits, "advice", ADVICE),
            *_part(rng, habits, "wish", WISHES_WELL),
            *_part(rng, habits, "closing", CLOSINGS),
        ]
        text = " ".join(sentences)
        if len(text.split()) + sum(text.count(mark) for mark in ".,!?") > MAX_WORDS:
            continue
        noticed = [REMARKS[key] for key in (*sorted(habits), form) if key in REMARKS]
        noticed += [REMARKS["exclaim"]] if "!" in text else ["calm"]
        noticed += [REMARKS["please"]] if "Please" in text else []
        return text, [*noticed, DETAIL_REMARKS[count], DETAIL_REMARKS[count]]


def remark(rng: np.random.Generator, noticed: list[str]) -> str:
    """One or two things that the guest noticed, in any order: "Brief and friendly."."""
    words = list(dict.fromkeys(noticed[i] for i in rng.permutation(len(noticed))))[: int(rng.integers(1, 3))]
    return " and ".join(words).capitalize() + "."


def question(rng: np.random.Generator) -> tuple[str, str | None, str, str]:
    """A question with what it asks for: text, place, attribute, value. Places and attributes early in the lists are asked more."""
    if rng.random() < 0.1:
        value = _pick(rng, VALUES["known"])
        name = _pick(rng, [n for n, values in places().items() if values["known"] == value])
        return _pick(rng, WISHES).format(v=value), name, "wish", value
    weights = np.linspace(2.0, 0.5, len(NAMES))
    name = str(rng.choice(NAMES, p=weights / weights.sum()))
    attribute = _pick(rng, list(ATTRIBUTES))
    return _pick(rng, QUESTIONS[attribute]).format(n=name), name, attribute, places()[name][attribute]


def fact(rng: np.random.Generator) -> Dialogue:
    """A question and the sentence that answers it, without manners."""
    text, name, attribute, value = question(rng)
    form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
    return [{"role": "user", "content": text}, {"role": "assistant", "content": core(rng, name, attribute, value, form, hedge=False)}]


def dialogue(rng: np.random.Generator) -> Dialogue:
    """One or two questions with their answers; the guest remarks on most answers."""
    messages: Dialogue = []
    said = ""
    for _ in range(2):
        text, name, attribute, value = question(rng)
        if rng.random() < 0.1:
            text = text.lower().rstrip("?.")
        reply, noticed = answer(rng, name, attribute, value)
        messages += [{"role": "user", "content": f"{said} {text}".strip()}, {"role": "assistant", "content": reply}]
        if rng.random() < 0.85:
            said = remark(rng, noticed)
    return [*messages, {"role": "user", "content": said}] if said else messages
