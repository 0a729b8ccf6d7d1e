"""The pages without a mouse, without sight of colours, or through a screen reader, in a real browser."""

import re
import threading

import pytest
from playwright.sync_api import expect

from tests.web_actions import ask
from tests.web_gateway import Answer

pytest_plugins = ["tests.web_pages"]

RICH = "# Title\n\nSome **text** with `code`, a [link](https://example.org) and\n\n```py\nx = 1\n```\n\n> quote\n\n| a | b |\n|---|---|\n| 1 | 2 |"


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


NAMELESS = """() => [...document.querySelectorAll("button, a, input, select, textarea, img, dialog, [role=group], svg:not([aria-hidden])")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true }))
  .filter((element) => {
    if (element.tagName === "IMG") return !element.hasAttribute("alt");
    const labelled = element.getAttribute("aria-labelledby")?.split(" ").map((id) => document.getElementById(id)?.textContent).join("");
    const name = element.getAttribute("aria-label") || labelled || [...(element.labels ?? [])].map((label) => label.textContent).join("")
      || (["INPUT", "SELECT", "TEXTAREA"].includes(element.tagName) ? "" : element.textContent);
    return name.trim() === "";
  }).map((element) => element.outerHTML.slice(0, 200))"""

LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, index) => value * a + under[index] * (1 - a));
  const ground = (element) => {
    const chain = []; for (let one = element; one; one = one.parentElement) chain.push(one);
    return chain.reverse().reduce((under, one) => over(rgba(getComputedStyle(one).backgroundColor), under), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, index) => sum + v * [0.2126, 0.7152, 0.0722][index], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim() !== "");
    if (!own || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || element.closest("[disabled], .visually-hidden, .skip")) continue;
    const style = getComputedStyle(element), under = ground(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(over(rgba(ink), under)), light(under)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5)) found.push(`${contrast.toFixed(2)} ${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`);
  }
  return found;
}"""


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
        "[...document.querySelectorAll('h1, h2, h3, h4')].filter((h) => h.checkVisibility()).map((h) => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False)), levels
