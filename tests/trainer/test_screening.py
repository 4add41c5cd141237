"""What does not fit the policy is counted and named."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_policy import make_tiny_policy

from deploy.manifest import BaseModelDigests
from feedback.errors import TrainingRefused
from feedback.snapshot import Row
from trainer.policy import Policy
from trainer.screening import of_another_base, prompts_of, within_context

OWN = BaseModelDigests(weights="1" * 64, tokenizer="2" * 64, template="3" * 64)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(make_tiny_policy(tmp_path_factory.mktemp("policy")))


def row(prompt: str, answer_a: str = " yes", answer_b: str = " no", adapters: tuple[str, str] = ("", "")) -> Row:
    """A choice; the tiny policy's tokens are words, and the template adds two."""
    return Row(
        event_id=f"{prompt}{answer_a}{answer_b}",
        kind="choice",
        rater="r",
        subject="r",
        cohorts=(),
        source="person",
        prompt=[{"role": "user", "content": prompt}],
        answer_a=answer_a,
        answer_b=answer_b,
        finish_a="stop",
        finish_b="stop",
        outcome="a",
        side="a",
        adapter_a=adapters[0],
        adapter_b=adapters[1],
        stamp=1,
    )


def test_prompts_longer_than_the_context_are_counted(policy: Policy) -> None:
    rows = [row(" red tea"), row(" red tea", " tea"), row(" one two three")]
    # <bos> red tea <say> are 4 tokens, <bos> one two three <say> are 5: 10 - 6 leave room for 4.
    found = prompts_of(rows, policy, None, max_model_len=10, max_tokens=6)
    assert len(found.fitting) == 1 and " red tea" in found.fitting[0]
    assert found.warnings == ["1 of 2 prompts left out of PPO: longer than 4 tokens beside an answer"]
    assert prompts_of(rows, policy, None, 11, 6).warnings == []
    with pytest.raises(TrainingRefused, match=r"none of 2 fits into 3 tokens beside its answer; raise policy\.max_model_len"):
        prompts_of(rows, policy, None, 9, 6)


def test_ratings_longer_than_the_context_are_dropped_and_counted(policy: Policy) -> None:
    # 4 tokens of prompt, the longer answer and its end: 4 + 1 + 1 and 4 + 3 + 1.
    rows = [row(" red tea"), row(" red tea", " yes", " no no no")]
    kept, warnings = within_context(rows, policy, None, 7)
    assert kept == rows[:1] and warnings == ["1 of 2 ratings dropped: longer than the context of 7 tokens"]
    assert within_context(rows, policy, None, 8) == (rows, [])


def test_answers_of_another_base_or_tokenizer_are_counted_and_named() -> None:
    known = {
        "a" * 64: OWN,
        "b" * 64: OWN.model_copy(update={"weights": "9" * 64}),
        "c" * 64: OWN.model_copy(update={"weights": "9" * 64, "tokenizer": "8" * 64}),
    }
    rows = [row(" x", adapters=("a" * 64, "b" * 64)), row(" y", adapters=("c" * 64, "c" * 64)), row(" z", adapters=("d" * 64, ""))]
    other, again, unknown = of_another_base(rows, known, OWN)
    assert other.startswith("3 of 5 rated answers were given on another base model than 11111111, by bbbbbbbbbbbbbbbb (99999999), cccc")
    assert again == "2 of 5 rated answers were given with another tokenizer and are tokenised again, as texts"
    assert unknown == "1 of 5 rated answers were given by adapters that this registry does not know"
    assert of_another_base(rows[:1], {"a" * 64: OWN, "b" * 64: OWN}, OWN) == []


def test_the_policy_folder_of_an_adapter_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    from cycle_world import SETTINGS, make_job

    from feedback.errors import InvalidInput
    from trainer.cycle import run_cycle

    job = make_job(tmp_path, count=6)
    (job.policy / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="holds an adapter"):
        run_cycle(job, SETTINGS, tmp_path)
    assert not (tmp_path / "cycles").exists()
