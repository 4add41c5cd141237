"""Plain rules that read a text: gates ask them about probe answers, guardrails about a canary's.

They need not be right about every answer, only right equally often about both of two policies that are compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

REFUSALS = re.compile(r"\b(i can(?:no|')t|i'm sorry|i am sorry|unable to|as an ai|i won't)\b", re.IGNORECASE)
FOREIGN_SHARE = 0.3
"""Of an answer's letters in scripts that its prompt does not use, from which on it is in another script."""
MIN_LETTERS = 8
"""An answer with fewer (a name, a number) has no language."""
MIN_WORDS = 2
"""Different function words that it takes to tell a language."""
ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "HANGUL"}
"""Japanese mixes three."""
FUNCTION_WORDS = {
    "English": "i a an in my me the and of to is are was you it that this with for not have what how why can do your be from which when",
    "German": "in im der die das und ist sind nicht ein eine zu mit für auf von ich sie wir wie was warum kann den dem auch wenn oder",
    "French": "le la les et est sont une des du pour dans que qui vous je nous pas avec sur comment pourquoi quel quelle ce cette il elle",
    "Spanish": "el la los las y es son una del para por que con no se cómo qué cuál como su más pero puede este esta muy usted",
    "Italian": "il lo la gli e è sono una di del della per che con non si come cosa perché può questo questa più ma anche nel",
    "Portuguese": "o os as e é são uma do da dos para por que com não se como qual você seu mais mas pode este esta isso em",
    "Dutch": "de het een en is zijn niet van voor met op ik je wij hoe wat waarom kan dat die ook als of naar uw maar",
    "Polish": "i jest są nie na do z że się jak co dlaczego może to ten ta dla od po czy ale oraz który która przez",
    "Turkish": "ve bir bu için ile değil nasıl ne neden olarak daha çok mi mı var ama gibi kadar olan sonra ben sen o da de",
}
WORDS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}


@cache
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").split(" ", 1)[0]
    return ONE_SCRIPT.get(first, first)


def scripts(text: str) -> Counter[str]:
    """How many letters of each script."""
    return Counter(_script(letter) for letter in text if letter.isalpha())


def language(text: str) -> str | None:
    """The language whose function words are most among a text's, where one has clearly the most."""
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    ranked = sorted(((len(words & known), name) for name, known in WORDS.items()), reverse=True)
    (most, name), (second, _) = ranked[0], ranked[1]
    return name if most >= MIN_WORDS and most > second else None


def other_language(prompt: str, answer: str) -> bool | None:
    """Whether the answer is in another script or language than the prompt; None where this rule cannot tell."""
    asked, said = scripts(prompt), scripts(answer)
    letters = sum(said.values())
    if letters < MIN_LETTERS or not asked:
        return None
    if sum(n for script, n in said.items() if script not in asked) > FOREIGN_SHARE * letters:
        return True
    before, after = language(prompt), language(answer)
    if before is None or after is None:
        return None if asked.keys() == {"LATIN"} else False
    return before != after


def refuses(text: str) -> bool:
    """Whether it has the words of a refusal, in English."""
    return bool(REFUSALS.search(text))


def repetition(text: str) -> float:
    """Share of word triples that occurred before in the same text, in [0, 1]."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
