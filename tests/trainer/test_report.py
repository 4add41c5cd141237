"""The report of an adapter: everything a person needs to judge it is on one page that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.records import AdapterRecord
from deploy.registry import Registry
from feedback.config import FeedbackSettings, Settings
from feedback.errors import NotFound
from feedback.stores import open_stores
from trainer.report import plot, report_of

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
STEPS = [
    {"step": 1, "score": 0.0, "stop_score": 0.1, "kl_nats": 0.0, "reply_tokens": 60.0},
    {"step": 2, "score": 1.5, "stop_score": 0.9, "kl_nats": 4.0, "reply_tokens": 40.0},
]
REWARD: dict[str, Any] = {
    "raters": 24,
    "simulated_raters": 24,
    "choices": 150,
    "thumbs": 270,
    "accuracy": {"prompts": {"value": 0.66, "low": 0.58, "high": 0.74}, "length": {"value": 0.57}},
    "tastes": [
        {"cohort": "brief", "what": "finished", "correlation": 0.4, "low": 0.2, "high": 0.6, "raters": 12},
        {"cohort": "brief", "what": "questions", "correlation": 0.1, "low": -0.2, "high": 0.4, "raters": 12},
    ],
    "warnings": ["2 of 420 ratings dropped: an answer is empty"],
    "calibration": {"error": 0.04, "by_chance": 0.03, "n": 100, "curve": [[0.3, 0.35, 40], [0.7, 0.65, 60]]},
    "findings": ["foretold chances of 100 choices on unseen prompts are off by 4.0 points"],
}
GAIN = {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24}
EVALUATION: dict[str, Any] = {
    "reward_gain_base": GAIN,
    "reward_gain_stable": GAIN,
    "kl_nats": 4.2,
    "kl_budget_nats": 6.0,
    "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420},
    "shuffled": False,
    "kl_finished_nats": 4.6,
    "finished_replies": 90,
    "kl_nats_at_1": 5.5,
    "length_matched_win": {"value": 0.71, "low": 0.6, "high": 0.82, "n": 33},
    "seeds": {"words": ["seed 1000 gains -0.10 sd against seed 0"], "lucky": False},
    **{name: {"base": 0.125, "candidate": 0.75} for name in ("length", "finished", "on_topic", "repetition", "refusal")},
    "probes": [{"prompt": "How do I <b>cut</b>?", "base": "To cut <script>", "stable": "It", "candidate": "Peel it first."}],
}
FACTS = "60 items cannot certify 2 points"


def _trained(
    folder: Path, policy: Path, make: MakeAdapter, registry: Registry, alarms: Sequence[str] = (), family: str = "ridge", **changed: object
) -> AdapterRecord:
    """A registered adapter with the files that its cycle left."""
    cycle = folder / "cycles" / "c1"
    cycle.mkdir(parents=True)
    (cycle / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    (cycle / "seed-1").mkdir()
    (cycle / "seed-1" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in STEPS[:1]))
    (cycle / "seed-1" / "ppo.json").write_text(json.dumps({"seed": 1000}))
    (cycle / "reward.json").write_text(json.dumps(REWARD | {"family": family}))
    (cycle / "details.json").write_text(json.dumps({"facts": {"words": FACTS}, "kl": {"by_position": [0.1, 0.2, 0.05]}}))
    adapter, path = make(policy, folder / "adapters", 1)
    record = registry.register(adapter, path, "trainer")
    training: dict[str, Any] = {"cycle": "c1", "seconds": {"ppo": 61.0}, "stopped_because": "the last iteration", "warnings": list(alarms)}
    registry.attest(adapter, "training", training, "trainer")
    registry.attest(adapter, "evaluation", EVALUATION | changed, "trainer")
    return record


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path / "data"))).engine)


def test_one_page_says_it_all(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry) -> None:
    folder = tmp_path / "data"
    record = _trained(folder, tiny_policy, make_adapter, registry)
    target = folder / "reports" / "one.html"
    gist = report_of(record, registry, folder, target)
    page = target.read_text()
    words = re.sub(r"\s+", " ", page)
    assert record.id[:16] in page
    assert "24 of 24 raters are simulated" in words
    assert "24 raters gave 150 choices and 270 thumbs" in words
    assert "66 % (58–74)" in words and "length alone with 57 %" in words
    # Score, second reward model, KL, length, KL by position, calibration.
    assert page.count("<svg ") == 6
    assert "<!-- seed 1000 -->" in page  # the plots call a run what the words do
    assert 'aria-label="KL by token position"' in page and 'aria-label="Reward model: calibration"' in page
    assert "4.6 of the 90 that ended by themselves" in words and "5.5 at temperature 1" in words
    assert "in 71 % of 33 pairs (60–82)" in words and "are off by 4.0 points" in words
    assert (
        "with other random numbers: seed 1000 gains -0.10 sd against seed 0." in words
        and "may be luck" not in words
        and "alarm" not in words
    )
    assert "\nLuck: seed 1000 gains" in gist
    assert "+0.80 sd against base (+0.50 … +1.10)" in words
    assert "4.2 nats" in words and "budget was 6.0" in words
    assert "+0.40" in page and "questions" not in page  # only what is surely preferred or disliked
    assert FACTS in page and "Peel it first." in page and "2 of 420 ratings dropped" in page
    assert "Control: the ratings were shuffled" not in page
    assert (
        "24 of 24 raters are simulated" in gist
        and "24 raters gave 150 choices and 270 thumbs; the reward model foresees 66 % (58–74)" in gist
    )
    assert "Alarm" not in gist and "The reward model agrees with 66 %" in words
    assert "\nbrief: likes finished\n" in gist and FACTS in gist and "\n  before: It\n  now:    Peel it first.\n" in gist


def test_it_needs_nothing_from_elsewhere_and_runs_nothing(
    tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry
) -> None:
    folder = tmp_path / "data"
    target = folder / "one.html"
    report_of(_trained(folder, tiny_policy, make_adapter, registry), registry, folder, target)
    page = target.read_text()
    # What people and models wrote is shown, never interpreted.
    assert "<script" not in page and "&lt;script&gt;" in page and "How do I &lt;b&gt;cut&lt;/b&gt;?" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "@import" not in page


def test_a_shuffled_control_says_so(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry) -> None:
    folder = tmp_path / "data"
    target = folder / "one.html"
    report_of(_trained(folder, tiny_policy, make_adapter, registry, shuffled=True), registry, folder, target)
    assert "Control: the ratings were shuffled" in target.read_text()


def test_without_training_there_is_nothing_to_report(
    tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry
) -> None:
    adapter, path = make_adapter(tiny_policy, tmp_path / "adapters", 1)
    record = registry.register(adapter, path, "mara")
    with pytest.raises(NotFound, match="no training and no evaluation"):
        report_of(record, registry, tmp_path, tmp_path / "one.html")
    assert not (tmp_path / "one.html").exists()


def test_a_gain_of_one_seed_only_is_marked_and_an_older_cycle_still_has_its_report(
    tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry
) -> None:
    folder, target = tmp_path / "data", tmp_path / "one.html"
    record = _trained(folder, tiny_policy, make_adapter, registry, seeds={"words": ["seed 1000 gains -2.00 sd"], "lucky": True})
    report_of(record, registry, folder, target)
    assert "what it gained may be luck" in target.read_text()
    before = {name: value for name, value in EVALUATION.items() if name not in ("seeds", "length_matched_win", "kl_nats_at_1")}
    registry.attest(record.id, "evaluation", before, "trainer")
    assert "Luck:" not in report_of(record, registry, folder, target)


def test_alarms_are_told_and_whose_figures_they_are(
    tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry
) -> None:
    folder, target = tmp_path / "data", tmp_path / "one.html"
    alarms = [f"PPO, step {step}: mean importance weight 2.50, outside [0.5, 2]" for step in range(1, 6)]
    gist = report_of(_trained(folder, tiny_policy, make_adapter, registry, alarms, "ensemble"), registry, folder, target)
    page = target.read_text()
    assert "5 alarms of PPO" in page and all(alarm in page for alarm in alarms)
    assert f"\nAlarm: {alarms[2]}\nAlarms: 2 more, in the report\nChanged: " in gist and alarms[3] not in gist
    assert "Ridge, beside the ensemble that was trained on, agrees with 66 %" in re.sub(r"\s+", " ", page)
    assert "ridge, beside the ensemble, foresees 66 %" in gist


def test_a_plot_has_the_colour_of_the_page() -> None:
    svg = plot("KL to the reference", "PPO step", "nats", {"candidate": ([1, 2], [0.0, 4.0]), "seed-1": ([1, 2], [0.0, 3.0])})
    assert svg.startswith('<svg role="img" aria-label="KL to the reference"')
    assert "currentColor" in svg and "#000000" not in svg
