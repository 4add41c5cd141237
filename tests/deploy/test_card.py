"""An adapter's card: what the registry knows, on a page and for the Hub, whatever strings it holds; and two adapters side by side."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner

import plaudit
from deploy.card import SMALLEST_COHORT, Card, card_of
from deploy.differences import differences
from deploy.gates import Verdict
from deploy.guards import GUARDRAILS
from deploy.manifest import ManifestFields, base_digests, write_adapter
from deploy.pages import in_markdown, model_card, page, plain
from deploy.registry import Registry
from feedback.config import FeedbackSettings, Settings
from feedback.errors import InvalidInput, NotFound
from feedback.stores import open_stores

MakeAdapter = Callable[[Path, Path, int], tuple[str, Path]]
HOSTILE = (
    "<script>alert(1)</script>",
    "</pre></td><img src=x onerror=alert(1)>",
    "[press](javascript:alert(1)) ![i](https://evil.example/i.png)",
    "https://evil.example www.evil.example",
    "a | b | c\n| d | e |\n\n# Heading\n\n---\nlicense: mit",
    "`code` **bold** ~~gone~~ $x^2$ &lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "\u202egnihtyna\u2066 \x1b[31mred\x1b[0m \x00",
)
GAIN = {"mean": 0.8, "low": 0.5, "high": 1.1, "n": 24}
VIEW = {"gap": GAIN, "prefers": 0.81, "likes": {"longer answers": 0.6, "lists": 0.1}}
SHOWN = [{"prompt": f"Question {i}?", "stable": "Before.", "candidate": text, "change": -0.5} for i, text in enumerate(HOSTILE)]
EVALUATION: dict[str, Any] = {
    "reward_gain_base": GAIN,
    "reward_gain_stable": GAIN | {"mean": 0.75},
    "kl_nats": 4.2,
    "kl_budget_nats": 6.0,
    "likelihood_gain": {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 420},
    "facts": {"n": 2200, "base": 0.72, "candidate": 0.715, "diff": -0.005, "low": -0.012, "margin_points": 2.0, "certifies_points": 1.9},
    **{name: {"base": 0.125, "stable": 0.5, "candidate": 0.75} for name in ("length", "finished", "on_topic", "repetition", "refusal")},
    "tone": {"questions": {"base": 0.5, "stable": 0.25, "candidate": 0.75}},
    "probes": [{"prompt": text, "base": text, "stable": text, "candidate": text} for text in HOSTILE],
    "answers": {"of": 96, "random": SHOWN, "worst": SHOWN},
    "influence": {
        "raters": 24,
        "ratings": 420,
        "everybody": VIEW,
        "cohorts": [
            {
                "cohort": "<b>brief|x",
                "raters": 14,
                "ratings": 300,
                "pull": GAIN | {"mean": 0.9},
                "without": {"gap": GAIN | {"mean": -0.1}, "prefers": 0.45, "likes": {"longer answers": -0.4, "lists": 0.05}},
            },
            {"cohort": "simulated", "raters": 24, "ratings": 420, "pull": None, "without": None},
        ],
        "merged": 2,
        "shuffled": {"gaps": [-0.3, 0.5, 0.1], "likelihood_gain": {"mean": -0.004, "low": -0.02, "high": 0.01, "n": 420}},
    },
}
TRAINING: dict[str, Any] = {
    "cycle": "c1",
    "judged_against": "b" * 64,
    "stopped_because": "the last iteration",
    "warnings": [],
    "reward_model": {
        "raters": 24,
        "simulated_raters": 24,
        "choices": 150,
        "thumbs": 270,
        "accuracy": {"prompts": {"value": 0.66, "low": 0.58, "high": 0.74, "n": 90}, "length": None},
        "dissenters": ["s_secret1", "s_secret2"],
        "ratings_by_rater": {"s_secret1": 20},
        "findings": ["2 of 7 raters judge against the others (s_secret1, s_secret2)"],
        "tastes": [
            {"cohort": "brief", "what": "lists", "correlation": -0.4, "low": -0.6, "high": -0.2, "raters": 12},
            {"cohort": "family of Mara", "what": "questions", "correlation": 0.9, "low": 0.8, "high": 1.0, "raters": SMALLEST_COHORT - 1},
        ],
        "warnings": ["2 of 420 ratings dropped: an answer is empty"],
    },
}
GUARD = Verdict(name="guardrail errors", verdict="pass", value=-0.04, comparison="<", threshold=0.01, reason="fine", detectable=0.136)
BLIND = Verdict(name="guardrail longer", verdict="inconclusive", reason="3 people in the smaller arm, at least 10 are needed")
GATE = Verdict(name="length", verdict="pass", reason="overridden by mara: people want it", overridden="fail")
LOOKED = [Verdict.error(name, "it was not there") for name in ("data", "replicas", "look", "approval")]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=tmp_path / "data")))
    yield Registry(stores.engine)
    stores.close()


@pytest.fixture
def trained(tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry) -> Callable[..., str]:
    """Registers a trained adapter with its evidence. Hostile strings stand wherever somebody else may write one."""
    _, weights = make_adapter(tiny_policy, tmp_path / "source", 1)

    def make(seed: int, **changed: Any) -> str:
        fields = ManifestFields(
            kind="trained",
            base_model=f"tiny {HOSTILE[0]}",
            base=base_digests(tiny_policy),
            temperature=0.7,
            system_prompt=HOSTILE[4],
            snapshot="5" * 64,
            reward_model="6" * 64,
            settings={"ppo": {"rank": 8, "note": HOSTILE[1]}},
            seed=seed,
        )
        adapter, path = write_adapter(weights, tmp_path / "data" / "adapters", fields)
        registry.register(adapter, path, "trainer")
        registry.attest(adapter, "training", TRAINING, "trainer")
        registry.attest(adapter, "evaluation", EVALUATION | changed, "trainer")
        return adapter

    return make


@pytest.fixture
def card(registry: Registry, trained: Callable[..., str], tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter) -> Card:
    """Of an adapter that a canary showed to people."""
    base, path = make_adapter(tiny_policy, tmp_path / "data" / "adapters", 0)
    registry.register(base, path, "system")
    registry.start_with(base, "system")
    adapter = trained(0)
    epoch = registry.lease("controller", "test", 60.0)
    assert epoch is not None
    rollout = registry.begin_rollout(adapter, "controller", epoch)
    open_ones = [Verdict.inconclusive("wins", "the canary wins 61.0%"), Verdict.inconclusive("step", "step 1 of 3")]
    rows = [each.model_dump(mode="json") for each in (GATE, GUARD, BLIND, *open_ones, *LOOKED)]
    registry.start_canary(rollout.id, 0.1, rows, "controller", epoch)
    registry.attest(adapter, "override", {"gate": "length", "reason": "people want it"}, "mara")
    return card_of(registry, adapter)


def front(readme: str) -> dict[str, Any]:
    """The front matter as the Hub's own client reads it."""
    return {name: value for name, value in vars(ModelCard(readme).data).items() if value is not None}


def rendered(markdown: str) -> str:
    """As the Hub would: the front matter taken off, tables on, raw HTML kept."""
    body = markdown.split("\n---\n", 1)[1]
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body))


def test_the_page_says_whose_preferences_these_are_and_what_changed(card: Card) -> None:
    words = re.sub(r"\s+", " ", page(card))
    assert "24 of 24 raters are simulated" in words
    assert "24 raters gave 150 choices and 270 thumbs" in words and "agrees with 66 % of choices" in words
    assert "2 raters judge against the others" in words
    # A cohort with its share, its pull, and what would have been preferred without it: only what changes by 0.2 or more.
    assert "14 (58 %)" in words and "300 (71 %)" in words and "+0.90" in words
    assert "in 45 % of pairs, by everybody in 81 %; longer answers (+0.6 → -0.4)</td>" in words
    assert "nobody else rated" in words and "2 further cohorts do not stand alone" in words
    assert "72.0% right before, 71.5% after, surely no worse than -1.2 points (2200 items)" in words
    assert "+0.75 against stable (+0.50 to +1.10)" in words
    assert '<td>refusals</td> <td class="n">12.5 %</td><td class="n">50.0 %</td><td class="n">75.0 %</td>' in words
    assert "foresees ratings of unseen prompts by -0.004 nats each (-0.020 to +0.010)" in words
    assert "By shuffled ratings this adapter gains +0.10 sd over base in the mean of 3 shuffles (-0.30 to +0.50)" in words
    assert "7 of 96 drawn at random" in words and "The 7 worst" in words
    assert "A person overrode: length" in words and "b" * 64 in words


def test_the_page_says_the_smallest_harm_that_the_canary_could_have_seen(card: Card) -> None:
    words = re.sub(r"\s+", " ", page(card))
    assert '<td>errors</td><td class="pass">pass</td><td class="n">+13.6 points</td><td>fine</td>' in words
    assert '<td>longer</td><td class="inconclusive">inconclusive</td><td class="n">none</td>' in words
    assert card.rollouts[0].guardrails[0][1] == GUARDRAILS[0].said(0.136)


def test_what_a_look_at_the_canary_found_is_no_gate(card: Card) -> None:
    # The verdicts of a rollout are its gates', its guardrails', and what each look found: step, data, replicas.
    assert card.rollouts[0].gates == [GATE]


def test_a_card_goes_through_json_whole(card: Card) -> None:
    assert Card.model_validate_json(card.model_dump_json()) == card


def test_no_rater_is_named_and_no_small_cohort_stands_alone(card: Card) -> None:
    told = [card.model_dump_json(), page(card), model_card(card)]
    assert not any(secret in text for text in told for secret in ("s_secret", "family of Mara"))
    # Who approved and overrode is the operator's business and not the Hub's.
    assert "mara" not in told[2] and "salt" not in told[0]


def test_nothing_that_was_written_is_interpreted(card: Card) -> None:
    shown = page(card)
    assert "<script" not in shown and "<img" not in shown and "<b>brief" not in shown and "{{" in shown
    assert not re.search(r"""(src|href)=["'](?!#)""", shown) and "default-src 'none'" in shown
    readme = rendered(model_card(card))
    assert "<script" not in readme and "<img" not in readme and "<del>" not in readme and "<s>" not in readme
    assert "<a " not in readme
    assert "evil.example" in readme and "www.evil" not in model_card(card)
    headings = re.findall(r"<h[1-6]>(.*?)</h", readme)
    assert "Heading" not in headings and "license: mit" not in headings
    # Every answer is one row of its table: 7 at random and 7 worst, each of four cells.
    tables = [each for each in re.findall(r"<table>.*?</table>", readme, flags=re.S) if "<th>Prompt</th>" in each]
    assert [each.count("<tr>") for each in tables] == [8, 8]
    assert all(len(re.findall("<td", row)) == 4 for each in tables for row in re.findall(r"<tr>.*?</tr>", each, flags=re.S)[1:])
    for text in (shown, readme):
        assert "\u202e" not in text and "\x1b" not in text and "\x00" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_in_markdown_a_text_comes_out_as_it_was(text: str) -> None:
    line = in_markdown(text)
    assert "\n" not in line
    out = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"x {line}")
    one_line = re.sub(r"\s*\n\s*", " ⏎ ", plain(text))
    assert html.unescape(out) == f"<p>x {one_line.rstrip()}</p>\n"


def test_the_front_matter_is_what_the_hub_reads(card: Card) -> None:
    readme = model_card(card, base_model="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
    data = front(readme)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "text-generation", "apache-2.0")
    assert {"lora", "plaudit", "simulated-raters"} <= set(data["tags"])
    assert "base_model" not in front(model_card(card)), "a policy's own name means nothing on the Hub"
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in readme


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_model", 'a/b"\nlicense: mit'), ("base_model", "nowhere"), ("license", "MIT License"), ("license", "a\nb: c")],
)
def test_what_can_be_no_name_on_the_hub_is_refused(card: Card, field: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=field.replace("_", ".")):
        model_card(card, **{field: value})


def test_a_cycle_on_shuffled_labels_stands_beside_the_real_one(registry: Registry, trained: Callable[..., str]) -> None:
    real = trained(0)
    assert card_of(registry, real).shuffled_runs == ()
    control = trained(1, shuffled=True, reward_gain_base=GAIN | {"mean": 0.02})
    (run,) = card_of(registry, real).shuffled_runs
    assert run.adapter == control and run.gain.mean == 0.02
    shown = page(card_of(registry, control))
    assert "Control: the ratings were shuffled" in shown and "Control: the ratings were shuffled" not in page(card_of(registry, real))


def test_what_older_trainers_did_not_measure_is_said_to_be_missing(
    tmp_path: Path, tiny_policy: Path, make_adapter: MakeAdapter, registry: Registry, trained: Callable[..., str]
) -> None:
    old = card_of(registry, trained(0, influence=None, answers=None, tone={}, facts=None, probes=[]))
    words = page(old)
    assert "was not measured when it was trained" in words and "No facts were given" in words and "None are kept" in words
    assert "It was never rolled out" in words and rendered(model_card(old))
    unread = card_of(registry, trained(1, kl_nats="many"))
    assert unread.evaluation is None and "kl_nats" in page(unread) and model_card(unread)
    identity, path = make_adapter(tiny_policy, tmp_path / "data" / "adapters", 0)
    registry.register(identity, path, "system")
    bare = card_of(registry, identity)
    assert "nobody knows whose preferences it carries" in page(bare) and front(model_card(bare))["library_name"] == "peft"
    with pytest.raises(NotFound):
        card_of(registry, "f" * 64)


def test_two_adapters_side_by_side(registry: Registry, trained: Callable[..., str]) -> None:
    here, there = (SHOWN[0] | {"candidate": text} for text in ("Take the tram.", "Take\x1b[31m the bus."))
    other = {"prompt": "Asked of one only?", "stable": "No.", "candidate": "No.", "change": 0.1}
    a = trained(0, answers={"of": 2, "random": [here, SHOWN[1]], "worst": []}, probes=[])
    b = trained(1, answers={"of": 2, "random": [there, other], "worst": []}, probes=[], kl_nats=5.0)
    parts = {part.title: part.rows for part in differences(card_of(registry, a), card_of(registry, b))}
    assert parts["Manifest"] == (("seed", "0", "1"),), "what is the same on both is left out"
    assert ("KL to the base", "4.2 of 6.0 nats", "5.0 of 6.0 nats") in parts["Figures"]
    assert ("refusals", "75.0 %", "75.0 %") in parts["Figures"], "that a figure is the same is news"
    assert ("brief: lists", "-0.40", "-0.40") in parts["Tastes"]
    assert ("<b>brief|x", "14 raters, 300 ratings, pull +0.90 sd", "14 raters, 300 ratings, pull +0.90 sd") in parts[
        "Raters and how much they moved it"
    ]
    # The same prompts are the same draw; no terminal is told to change its colour by an answer.
    assert parts["Answers"] == (("Question 0?", "Take the tram.", "Take[31m the bus."),)
    assert "Verdicts" not in parts


def test_the_commands_write_both_files_and_print_the_tables(
    tmp_path: Path, trained: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    settings = tmp_path / "plaudit.toml"
    settings.write_text(f'[feedback]\ndata_dir = "{tmp_path / "data"}"\n')
    a, b = trained(0), trained(1, kl_nats=5.0)
    done = CliRunner().invoke(plaudit.app, ["adapters", "card", a[:12], "--license", "apache-2.0", "--config", str(settings)])
    folder = tmp_path / "data" / "cards" / a[:16]
    assert done.exit_code == 0 and str(folder / "README.md") in done.stdout and a[:16] in (folder / "card.html").read_text()
    # The base is the one that these settings serve, by its name on the Hub.
    data = front((folder / "README.md").read_text())
    assert (data["base_model"], data["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    told = CliRunner().invoke(plaudit.app, ["adapters", "diff", a[:12], b[:12], "--config", str(settings)])
    assert told.exit_code == 0 and "4.2 of 6.0 nats" in told.stdout and "5.0 of 6.0 nats" in told.stdout and "Question 0?" in told.stdout
    assert "\x1b[31m" not in told.stdout
