"""The pages without a mouse, without sight of colours, or through a screen reader, in a real browser."""

import re
import threading
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from tests.web_actions import ask
from tests.web_audit import LOW_CONTRAST, NAMELESS
from tests.web_gateway import Answer

pytest_plugins = ["tests.web_pages"]

RICH = """# Title

Some **text** with `code`, a [link](https://example.org) and

```py
x = 1
```

> quote

| a | b |
|---|---|
| 1 | 2 |
"""


def test_a_conversation_needs_nothing_but_the_keyboard(visit, gateway):
    gateway.answers = [Answer(["One"]), Answer(["Two"], hold=threading.Event()), Answer(["Three"])]
    page = visit()
    keys = page.keyboard
    keys.type("First")  # the field has the focus from the start
    keys.press("Shift+Enter")
    keys.type("and more")
    keys.press("Enter")
    expect(page.locator(".prose")).to_have_text("One")
    assert gateway.requests[-1]["messages"][-1]["content"] == "First\nand more"
    keys.type("Second")
    keys.press("Enter")
    expect(page.locator(".prose").last).to_have_text("Two")
    keys.press("Escape")
    expect(page.locator(".message.assistant .state").last).to_have_text("Stopped.")
    keys.press("ArrowUp")
    expect(page.locator("#question")).to_have_value("Second")
    keys.press("Escape")
    expect(page.locator("#question")).to_have_value("")
    keys.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    keys.press("Control+b")
    expect(page.locator("#sidebar")).to_be_hidden()
    keys.press("Control+b")
    expect(page.locator("#close-sidebar")).to_be_focused()
    keys.press("Tab")
    expect(page.locator("#new")).to_be_focused()
    keys.press("Tab")
    expect(page.locator("#conversations .open")).to_be_focused()
    keys.press("Enter")
    expect(page.locator(".prose").first).to_have_text("One")
    expect(page.locator("#question")).to_be_focused()


def test_shortcuts_are_listed_and_letters_are_only_shortcuts_outside_of_fields(visit):
    page = visit()
    page.keyboard.type("what? 1/2")
    expect(page.locator("#question")).to_have_value("what? 1/2")
    page.locator("#title").evaluate("() => document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#shortcuts div")).to_have_count(8)
    page.keyboard.press("Escape")
    page.locator("#title").evaluate("() => document.activeElement.blur()")
    page.keyboard.press("/")
    expect(page.locator("#question")).to_be_focused()


def test_the_first_stop_skips_to_the_question(visit):
    page = visit()
    page.locator("#title").evaluate("() => { document.activeElement.blur(); }")
    page.evaluate("document.querySelector('.skip').focus()")
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()


def test_dialogs_give_the_focus_back(visit):
    page = visit()
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate("document.getElementById('settings').contains(document.activeElement)")
    page.keyboard.press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()


def test_on_a_narrow_screen_the_sides_lie_over_the_page(visit):
    page = visit(viewport={"width": 360, "height": 700}, has_touch=True)
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#panel")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ask(page, "Hello")
    page.click("#open-sidebar")
    page.click("#conversations .open")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#toggle-panel")
    expect(page.locator("#panel")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_an_answer_is_announced_in_sentences_and_not_too_often(visit, gateway):
    gateway.answers = [Answer([f"Sentence number {n}. " for n in range(200)], pause_s=0.005)]
    page = visit()
    page.evaluate(
        """() => {
          window.said = [];
          const region = document.getElementById("announcer");
          new MutationObserver(() => window.said.push(region.textContent)).observe(region, { childList: true });
        }"""
    )
    ask(page, "Talk")
    said = page.evaluate("window.said")
    assert said[0] == "Answering"
    assert said[-1].endswith("Answer complete")
    assert len(said) <= 5
    assert "".join(said[1:]).count("Sentence number") == 200


def test_motion_is_reduced_for_those_who_ask_for_it(visit):
    page = visit(reduced_motion="reduce")
    durations = page.evaluate(
        """[...document.querySelectorAll("*")].flatMap((element) => {
          const style = getComputedStyle(element);
          return [style.transitionDuration, style.animationDuration];
        }).flatMap((value) => value.split(", ").map(parseFloat))"""
    )
    assert max(durations) < 0.001


@pytest.fixture(params=["light", "dark"])
def states(request, visit, gateway):
    """The pages in the states that people meet, one after the other."""

    def walk():
        gateway.answers = [Answer([RICH]), Answer(["Half"], breaks=True)]
        page = visit(color_scheme=request.param)
        yield "welcome", page
        ask(page, "A question")
        ask(page, "Another")
        page.wait_for_selector("#panel-tiers li")
        yield "conversation", page
        page.click("#open-settings")
        yield "settings", page
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Delete “A question”").click()
        yield "deleting", page
        page = visit("/dashboard", color_scheme=request.param)
        page.wait_for_selector("#outcomes tr")
        yield "dashboard", page

    return walk


def test_every_control_has_a_name_and_all_text_has_contrast(states):
    for name, page in states():
        assert page.evaluate(NAMELESS) == [], name
        page.wait_for_timeout(250)  # colours change softly
        assert page.evaluate(LOW_CONTRAST) == [], name


def test_axe_finds_nothing(states):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    for name, page in states():
        results = axe.run(page)
        assert results.violations_count == 0, f"{name}\n{results.generate_report()}"


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_landmarks_and_headings_have_an_order(visit, path):
    page = visit(path)
    tree = page.locator("body").aria_snapshot()
    for landmark in ("banner", "main"):
        assert len(re.findall(rf"^\s*- {landmark}\b", tree, re.MULTILINE)) == 1, tree
    if path == "/":
        assert 'navigation "Conversations"' in tree
        assert 'complementary "Live numbers"' in tree
        ask(page, "A question")
    levels = page.evaluate(
        """[...document.querySelectorAll("h1, h2, h3, h4")]
             .filter((heading) => heading.checkVisibility())
             .map((heading) => Number(heading.tagName[1]))"""
    )
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels)), levels
