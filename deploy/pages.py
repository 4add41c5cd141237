"""An adapter's card for people: one HTML page for an operator, and the README that the Hub wants.

What raters, models and applications wrote is data: no renderer of HTML or Markdown takes it for anything else.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from deploy.card import SMALLEST_COHORT, Card, facts_of
from deploy.gates import Gain
from feedback.errors import ConfigError, InvalidInput

LIMITS = (
    "Behaviour carries the preferences of whoever rated. The tables above say who that was; nobody else was asked.",
    "Learning from ratings tunes behaviour, not facts. Those that were compared stand above; nothing else was.",
    "A reward model does not notice over-optimisation where nobody has rated; a second round, in which people rate these answers, does.",
    "What a canary could not have seen is not excluded by it; the smallest harms that it would have seen stand above.",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# Direction marks turn a line of text around, other control characters move a terminal's cursor; neither is what anybody wrote to be read.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def plain(text: str) -> str:
    """A text without what nobody sees: control characters and marks that turn its direction."""
    return UNSEEN.sub("", text)


def page(card: Card) -> str:
    """One HTML file that needs nothing else and runs nothing. Raises ConfigError without jinja2."""
    return _rendered("card.html", card, {})


def model_card(card: Card, *, base_model: str | None = None, license: str = "unknown") -> str:
    """README.md for a repository on the Hub: YAML front matter and Markdown. Raises ConfigError without jinja2.

    `base_model` is the base's name on the Hub; without one the front matter names none, since a policy's own name means nothing there.
    Raises InvalidInput for what can be no name or no licence there.
    """
    if base_model is not None and not HUB_NAME.fullmatch(base_model):
        raise InvalidInput(f"base-model: {base_model[:96]!r} is no name on the Hub; it looks like owner/name", field="base_model")
    if not LICENSE.fullmatch(license):
        raise InvalidInput(
            f"license: {license[:40]!r} is no identifier of a licence; write one as the Hub does, e.g. apache-2.0", field="license"
        )
    tags = ["lora", "ppo" if card.manifest.kind == "trained" else "identity", "rlhf", "plaudit"]
    front: dict[str, Any] = {
        **({"base_model": base_model, "base_model_relation": "adapter"} if base_model else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": license,
        "tags": tags + (["simulated-raters"] if card.simulated else []),
    }
    # JSON is YAML, and quotes whatever a name may hold.
    return _rendered(
        "card.md", card, {"front": "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()), "base": base_model}
    )


class Trusted(str):
    """Text of ours that is Markdown already."""


def _rendered(name: str, card: Card, more: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError as exc:
        raise ConfigError("a card needs jinja2: install plaudit[console]", field="console") from exc
    markdown = name.endswith(".md")
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("deploy"),
        autoescape=not markdown,
        finalize=in_markdown if markdown else _in_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "signed": signed, "trusted": Trusted, "json": _json, "pre": _pre, "within": _within}
    told: dict[str, Any] = {"card": card, "manifest": card.manifest, "evaluation": card.evaluation, "training": card.training}
    told |= {"limits": LIMITS, "smallest": SMALLEST_COHORT, "facts": facts_of(card), "bars": bars(card)}
    return templates.get_template(name).render(told | dict(more))


def _in_html(value: object) -> object:
    return plain(value) if type(value) is str else value


def in_markdown(value: object) -> str:
    """A value as text that no renderer of Markdown or HTML takes for anything else, in one line."""
    if isinstance(value, Trusted):
        return value
    text = html.escape(plain(str(value)), quote=True)
    text = re.sub(r"[\\`*_\[\]|~$:@!#{}]|(?<=www)\.", lambda found: f"&#{ord(found.group())};", text)
    return re.sub(r"\s*\n\s*", " ⏎ ", text)


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}"


def _within(found: Gain, digits: int = 2) -> str:
    """The interval of a mean, if it has one."""
    return "" if found.low is None or found.high is None else f" ({signed(found.low, digits)} to {signed(found.high, digits)})"


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


def _pre(text: str) -> Trusted:
    return Trusted(html.escape(plain(text)))


def bars(card: Card) -> dict[str, tuple[float, float]]:
    """Where the bar of each cohort's pull begins and how wide it is, in percent of its cell; zero is the middle."""
    influence = card.evaluation.influence if card.evaluation else None
    pulls = {each.cohort: each.pull.mean for each in influence.cohorts if each.pull} if influence else {}
    most = max([abs(pull) for pull in pulls.values()], default=0.0) or 1.0
    return {name: (50 + min(0.0, 50 * pull / most), abs(50 * pull / most)) for name, pull in pulls.items()}
