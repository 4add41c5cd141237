"""What of a snapshot fits the policy: too long for its context, answers of another model. Each is counted and named.

What of it can teach at all is asked in `labels.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.manifest import BaseModelDigests
from feedback.errors import TrainingRefused

if TYPE_CHECKING:
    from feedback.snapshot import Row
    from trainer.policy import Policy


@dataclass(frozen=True)
class Prompts:
    """What people asked and rollouts can answer, each once, as JSON in a fixed order."""

    fitting: list[str]
    asked: int
    room: int
    """Tokens of the context that an answer leaves."""

    @property
    def warnings(self) -> list[str]:
        long = self.asked - len(self.fitting)
        return [f"{long} of {self.asked} prompts left out of PPO: longer than {self.room} tokens beside an answer"] if long else []


def prompts_of(rows: Sequence[Row], policy: Policy, system_prompt: str | None, max_model_len: int, max_tokens: int) -> Prompts:
    """The prompts of these rows. Raises TrainingRefused where none fits into the context beside its answer."""
    texts = sorted({json.dumps(row.prompt, sort_keys=True) for row in rows})
    room = max_model_len - max_tokens
    fitting = [text for text in texts if len(policy.encode(json.loads(text), system_prompt)) <= room]
    if not fitting:
        told = f"prompts: none of {len(texts)} fits into {room} tokens beside its answer; raise policy.max_model_len"
        raise TrainingRefused(told, field="max_model_len")
    return Prompts(fitting, len(texts), room)


def within_context(rows: Sequence[Row], policy: Policy, system_prompt: str | None, max_model_len: int) -> tuple[list[Row], list[str]]:
    """Rows whose prompt with each of its answers fits into the context, and how many do not: imported pairs may be of any length."""

    def longest(row: Row) -> int:
        answers = max((row.answer_a, row.answer_b or ""), key=len)
        reply = policy.reply(row.prompt, system_prompt, answers, True)
        return len(reply.prompt) + len(reply.tokens)

    kept = [row for row in rows if longest(row) <= max_model_len]
    long = len(rows) - len(kept)
    return kept, [f"{long} of {len(rows)} ratings dropped: longer than the context of {max_model_len} tokens"] if long else []


def of_another_base(rows: Sequence[Row], answered_by: Mapping[str, BaseModelDigests], own: BaseModelDigests) -> list[str]:
    """How many rated answers came from another model or another tokenizer, by the manifests of the adapters that gave them.

    They are not refused: an answer is learnt from as text, tokenised by this policy, and no recorded token ids are used. But they are
    answers that this policy might never give, so the reward model knows less about those that it does.
    """
    gave = Counter(adapter for row in rows for adapter in (row.adapter_a, row.adapter_b) if adapter)
    total = sum(gave.values())
    other = {adapter: count for adapter, count in gave.items() if adapter in answered_by and answered_by[adapter] != own}
    retokenised = sum(count for adapter, count in other.items() if answered_by[adapter].tokenizer != own.tokenizer)
    unknown = sum(count for adapter, count in gave.items() if adapter not in answered_by)
    found = []
    if other:
        names = ", ".join(f"{adapter[:16]} ({answered_by[adapter].weights[:8]})" for adapter in sorted(other))
        found.append(
            f"{sum(other.values())} of {total} rated answers were given on another base model than {own.weights[:8]}, by {names}; "
            "they are learnt from as texts that this policy might not write"
        )
    if retokenised:
        found.append(f"{retokenised} of {total} rated answers were given with another tokenizer and are tokenised again, as texts")
    if unknown:
        found.append(f"{unknown} of {total} rated answers were given by adapters that this registry does not know")
    return found
