"""The chat page in a real browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving_world import World, serve
from waiting import until

from deploy.engine import Scripted
from feedback.events import FeedbackGiven
from serving.app import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(__file__).parents[2] / "serving/page/index.html"


def test_the_page_reaches_for_nothing_outside() -> None:
    source = PAGE.read_text()
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", source) == []
    assert " style=" not in source and not re.search(r"\son[a-z]+=", source)  # the content security policy would block them
    assert len(Page._hashes(source, "script").split()) == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} does not exist")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=str(CHROMIUM))
        yield running
        running.close()


def answer(name: str, messages: Any) -> str:
    return f"You asked: {messages[-1]['content']} Here is a calm answer in two sentences. It has nothing to hide."


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serve(tmp_path, engine=Scripted(answer, token_s=0.01)) as running:
        yield running


def given(world: World) -> list[FeedbackGiven]:
    return [event for event in world.events() if isinstance(event, FeedbackGiven)]


def open_page(browser: Browser, world: World, share: float = 0.0, **options: Any) -> Any:
    """A fresh visitor's page; fails the test on any script error or blocked resource."""
    html = world.app.state.page.html
    world.app.state.page.html = re.sub(r'"compare": [0-9.]+', f'"compare": {share}', html)
    context = browser.new_context(**options)
    shown: Any = context.new_page()
    problems: list[str] = []
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    shown.problems = problems
    shown.goto(world.url)
    return shown


def picture(shown: Any, name: str) -> None:
    """Kept only where somebody wants to look."""
    if folder := os.environ.get("PLAUDIT_TEST_PICTURES"):
        shown.screenshot(path=f"{folder}/{name}.png")


def ask(shown: Any, text: str) -> None:
    shown.get_by_label("Your message").fill(text)
    shown.keyboard.press("Enter")


@pytest.mark.slow
def test_chat_and_rate_with_one_click(browser: Browser, world: World) -> None:
    shown = open_page(browser, world)
    picture(shown, "welcome")
    ask(shown, "Is it raining?")
    shown.get_by_role("article").get_by_text("nothing to hide").wait_for()
    assert given(world) == []
    good = shown.get_by_role("button", name="Good", exact=True)
    good.click()
    shown.get_by_text("Thank you, saved").first.wait_for()
    (rating,) = given(world)
    assert (rating.value, rating.reasons) == ("up", ())
    assert good.get_attribute("aria-pressed") == "true"
    shown.get_by_role("button", name="clear").click()
    until(lambda: [event.reasons for event in given(world)] == [(), ("clear",)])
    picture(shown, "rated")
    shown.keyboard.press("d")  # the focus is on a chip: keys work outside the message field
    until(lambda: given(world)[-1].value == "down")
    shown.reload()
    not_good = shown.get_by_role("button", name="Not good")
    not_good.wait_for()
    until(lambda: not_good.get_attribute("aria-pressed") == "true")
    assert shown.problems == []


@pytest.mark.slow
def test_a_comparison_by_keyboard(browser: Browser, world: World) -> None:
    shown = open_page(browser, world, share=1.0)
    ask(shown, "Tell me something.")
    choose = shown.get_by_role("button", name="B is better")
    assert choose.is_disabled()
    until(lambda: choose.is_enabled())
    picture(shown, "comparison")
    shown.keyboard.press("Escape")
    shown.keyboard.press("b")
    shown.get_by_role("region").get_by_text("goes on with B").wait_for()
    (choice,) = given(world)
    assert (choice.slot, choice.value) == ("choice", "b")
    picture(shown, "chosen")
    ask(shown, "And more?")  # never two comparisons running
    shown.get_by_role("button", name="Not good").wait_for()
    assert shown.get_by_role("button", name="B is better").count() == 1
    assert shown.problems == []


@pytest.mark.slow
def test_a_rating_that_could_not_be_stored_is_taken_back(browser: Browser, world: World) -> None:
    shown = open_page(browser, world)
    ask(shown, "Hello?")
    shown.get_by_role("article").get_by_text("nothing to hide").wait_for()
    shown.route("**/v1/feedback", lambda route: route.fulfill(status=503, json={"error": {"message": "the disk is full"}}))
    good = shown.get_by_role("button", name="Good", exact=True)
    good.click()
    shown.get_by_text("Not saved: the disk is full").first.wait_for()
    assert good.get_attribute("aria-pressed") == "false"


@pytest.mark.slow
def test_an_engine_that_is_away_is_said_and_can_be_tried_again(browser: Browser, world: World) -> None:
    shown = open_page(browser, world)
    world.engine.up = False
    ask(shown, "Hello?")
    again = shown.get_by_role("button", name="Try again")
    again.wait_for()
    picture(shown, "away")
    world.engine.up = True
    again.click()
    shown.get_by_role("article").get_by_text("nothing to hide").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, world: World, scheme: str) -> None:
    options = {"viewport": {"width": 320, "height": 640}, "color_scheme": scheme}
    shown = open_page(browser, world, share=1.0, **options)
    ask(shown, "A-very-long-word-" * 10)
    until(lambda: shown.get_by_role("button", name="Tie").is_enabled())
    picture(shown, f"narrow-{scheme}")
    assert shown.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_visitor_deletes_their_data(browser: Browser, world: World) -> None:
    shown = open_page(browser, world)
    shown.fill("#prompt", "my secret")
    shown.keyboard.press("Enter")
    shown.get_by_role("button", name="Good", exact=True).click()
    shown.locator(".said", has_text="Thank you, saved").wait_for()
    shown.once("dialog", lambda dialog: dialog.accept())
    shown.click("#forget")
    shown.locator("#consent", has_text="Your data is deleted.").wait_for()
    assert [event.type for event in world.events()] == ["subject.erased"]
    assert shown.get_by_text("my secret").count() == 0 and shown.problems == []
