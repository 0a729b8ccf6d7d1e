"""The chat page in a real browser: asking, answers that stream, versions, history, settings, languages."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.web_actions import answer, ask, until
from tests.web_gateway import Answer

pytest_plugins = ["tests.web_pages"]


def test_an_answer_appears_while_it_comes(visit, gateway):
    rest = threading.Event()
    gateway.answers = [Answer(["Forty-two ", "is **the** answer."], hold=rest)]
    page = visit()
    ask(page, "What is 40 + 2?", wait=False)
    expect(page.locator(".message.assistant .prose")).to_have_text("Forty-two is the answer.")
    expect(page.locator("#stop")).to_be_visible()
    rest.set()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".prose strong")).to_have_text("the")
    expect(page.locator(".message.assistant .metrics")).to_contain_text("12 tokens")
    expect(page.locator(".message.assistant .metrics")).to_contain_text("32 of 40 prompt tokens from the cache")
    [request] = gateway.requests
    assert request == {
        "model": "wicore",
        "messages": [{"role": "user", "content": "What is 40 + 2?"}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_the_request_and_keeps_what_came(visit, gateway, how):
    gateway.answers = [Answer(["Half of it"], hold=threading.Event())]
    page = visit()
    ask(page, "Tell me all", wait=False)
    expect(page.locator(".prose")).to_have_text("Half of it")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".message.assistant .state")).to_have_text("Stopped.")
    assert answer(page) == "Half of it"
    end = time.monotonic() + 10
    while not gateway.left and time.monotonic() < end:
        time.sleep(0.01)
    assert gateway.left == 1
    ask(page, "And then?")
    assert [turn["content"] for turn in gateway.requests[-1]["messages"]] == ["Tell me all", "Half of it", "And then?"]


def test_conversations_outlive_a_reload_and_can_be_renamed_and_deleted(visit):
    page = visit()
    ask(page, "First question")
    page.click("#new")
    ask(page, "Second question")
    page.reload()
    expect(page.locator("#conversations .open")).to_have_text(["Second question", "First question"])
    expect(page.locator(".message.user .text")).to_have_text("Second question")
    page.click("text=First question")
    expect(page.locator(".message .text, .message .prose")).to_have_text(["First question", "First question"])
    page.get_by_role("button", name="Rename “First question”").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Renamed")
    page.get_by_role("button", name="Delete “Renamed”").click()
    page.click("#delete-confirm")
    expect(page.locator("#conversations .open")).to_have_text(["Second question"])
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator("#conversations .open")).to_have_text(["Second question"])


def test_an_answer_goes_on_while_another_conversation_is_read(visit, gateway):
    rest = threading.Event()
    gateway.answers = [Answer(["slow"], hold=rest)]
    page = visit()
    ask(page, "A long one", wait=False)
    expect(page.locator(".prose")).to_have_text("slow")
    page.click("#new")
    expect(page.locator("#conversations .busy")).to_have_text("A long one")
    ask(page, "A quick one")
    assert answer(page) == "A quick one"
    rest.set()
    expect(page.locator("#conversations .busy")).to_have_count(0)
    page.click("text=A long one")
    expect(page.locator(".prose")).to_have_text("slow")
    expect(page.locator(".message.assistant .state")).to_be_hidden()


def test_answers_and_questions_have_versions(visit, gateway):
    gateway.answers = [Answer([text]) for text in ("one", "two", "three", "edited")]
    page = visit()
    ask(page, "Q1")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".prose")).to_have_text("two")
    expect(page.locator(".versions")).to_have_text("2 / 2")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".prose")).to_have_text("one")
    ask(page, "Q2")
    assert [turn["content"] for turn in gateway.requests[-1]["messages"]] == ["Q1", "one", "Q2"]
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    ask(page, "Q1, better")
    assert [turn["content"] for turn in gateway.requests[-1]["messages"]] == ["Q1, better"]
    expect(page.locator(".message .text, .message .prose")).to_have_text(["Q1, better", "edited"])
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".message .text, .message .prose")).to_have_text(["Q1", "one", "Q2", "three"])
    page.reload()
    expect(page.locator(".message .text, .message .prose")).to_have_text(["Q1", "one", "Q2", "three"])


def test_cancelled_editing_gives_the_draft_back(visit):
    page = visit()
    ask(page, "Old question")
    page.fill("#question", "half a draft")
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#question")).to_have_value("Old question")
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("half a draft")
    expect(page.locator("#editing")).to_be_hidden()


def test_answers_and_code_can_be_copied(visit, gateway):
    gateway.answers = [Answer(["Run `x`:\n\n```sh\nls -l\n```\n"])]
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "How?")
    page.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "ls -l"
    page.locator(".message.assistant").get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == "Run `x`:\n\n```sh\nls -l\n```\n"


def test_settings_go_with_the_request_and_are_kept(visit, gateway):
    gateway.models = ["wicore", "other"]
    page = visit()
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.3")
    page.fill("#max-tokens", "64")
    page.keyboard.press("Escape")
    page.select_option("#model", "other")
    page.reload()
    ask(page, "Hello")
    request = gateway.requests[-1]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["model"], request["temperature"], request["max_completion_tokens"]) == ("other", 0.3, 64)


def test_values_out_of_range_are_not_taken(visit, gateway):
    page = visit()
    page.click("#open-settings")
    page.fill("#temperature", "7")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    assert "temperature" not in gateway.requests[-1]


def test_the_language_is_the_browsers_until_one_is_chosen(visit):
    page = visit(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    expect(page.locator("#welcome h2")).to_have_text("想了解些什么？")
    page.click("#open-settings")
    page.select_option("#language", "en")
    expect(page.locator("#welcome h2")).to_have_text("What would you like to know?")
    page.reload()
    assert page.locator("html").get_attribute("lang") == "en"


KEYS = {"enter", "shift", "esc", "ctrl", "b", "o"}
UNITS = {"kib", "mib", "gib"}
NAMES = {"wicore", "kv", "english", "metrics"}

ALL_TEXTS = """() => {
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) texts.push(walker.currentNode.data);
  for (const element of document.querySelectorAll("*"))
    for (const name of ["aria-label", "title", "placeholder", "alt"]) texts.push(element.getAttribute(name) ?? "");
  return texts.join("\\n");
}"""


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_in_chinese_no_english_is_left(visit, path):
    page = visit(path, locale="zh-CN")
    if path == "/":
        ask(page, "你好")
        page.wait_for_selector("#panel-tiers li")
        page.click("#open-settings")
    else:
        page.wait_for_selector("#outcomes tr")
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", page.evaluate(ALL_TEXTS))}
    told_by_the_server = {
        "triton",
        "stop",
        "length",
        "cancelled",
        "queue",
        "full",
        "never",
        "seen",
        "before",
        "tokens",
        "executor",
        "onnx",
    }
    assert words - KEYS - UNITS - NAMES - told_by_the_server == set()


def test_dark_and_light_follow_the_system_until_one_is_chosen(visit):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = visit(color_scheme="dark")
    dark = ground(page)
    page.emulate_media(color_scheme="light")
    light = ground(page)
    assert dark != light
    page.click("#open-settings")
    page.locator("#settings .segments label", has_text="Dark").click()
    assert ground(page) == dark
    page.reload()
    assert ground(page) == dark


def test_enter_that_chooses_chinese_characters_does_not_send(visit, gateway):
    page = visit()
    page.fill("#question", "ni hao")
    page.evaluate(
        """() => document.getElementById("question").dispatchEvent(
            new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    page.press("#question", "Shift+Enter")
    expect(page.locator("#question")).to_have_value("ni hao\n")
    assert gateway.requests == []


def test_a_long_history_shows_its_end_first(visit):
    page = visit()
    ask(page, "start")
    page.evaluate(
        """async () => {
          const id = location.hash.slice(1);
          const opening = indexedDB.open("wicore");
          await new Promise((done) => { opening.onsuccess = done; });
          const database = opening.result;
          const writing = database.transaction(["conversations", "messages"], "readwrite");
          let parent = null;
          for (let n = 0; n < 400; n += 1) {
            const role = n % 2 ? "assistant" : "user";
            const message = { id: `m${n}`, conversation: id, parent, created: n, role, text: `message ${n}` };
            writing.objectStore("messages").put({ ...message, state: "done", finish: "stop" });
            parent = message.id;
          }
          const conversation = { id, title: "Long", named: false, created: 0, updated: 0, head: parent };
          writing.objectStore("conversations").put(conversation);
          await new Promise((done) => { writing.oncomplete = done; });
          database.close();
        }"""
    )
    page.reload()
    expect(page.locator(".message").last).to_contain_text("message 399")
    expect(page.locator(".message").last).to_be_in_viewport()
    assert page.locator(".message").count() == 40
    page.get_by_role("button", name="Show 360 earlier messages").click()
    assert page.locator(".message").count() == 120


def test_a_growing_answer_leaves_what_is_settled_alone(visit, gateway):
    rest = threading.Event()
    gateway.answers = [Answer([f"Paragraph {n} of many words.\n\n" for n in range(40)], hold=rest)]
    page = visit()
    ask(page, "Write a lot", wait=False)
    page.wait_for_selector(".prose p >> nth=8")
    page.evaluate("document.querySelectorAll('.prose p')[3].marked = true")
    expect(page.locator(".prose p")).to_have_count(40)
    rest.set()
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("document.querySelectorAll('.prose p')[3].marked === true")


def test_the_view_follows_the_answer_only_from_its_end(visit, gateway):
    rest = threading.Event()
    gateway.answers = [Answer([f"Line {n}\n\n" for n in range(150)], pause_s=0.004, hold=rest)]
    page = visit()
    ask(page, "Count", wait=False)
    page.wait_for_selector(".prose p >> nth=60")
    at_end = """(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight < 48)
        (document.getElementById("scroll"))"""
    until(page, at_end)
    page.evaluate("document.getElementById('scroll').scrollTop = 100")
    expect(page.locator("#to-end")).to_be_visible()
    page.wait_for_selector(".prose p >> nth=149")
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 100
    page.click("#to-end")
    until(page, at_end)
    rest.set()


WATCH = """
  window.starts = new Set(); // where the centre was painted
  window.slides = [];
  document.addEventListener("transitionrun", ({ target, propertyName }) => {
    if (target.id === "layout") window.slides.push(propertyName);
  });
  const look = () => {
    const [shown] = document.querySelector(".centre")?.getClientRects() ?? [];
    if (shown) window.starts.add(shown.left);
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
"""


def test_the_sides_are_in_their_places_at_the_first_view_and_slide_when_toggled(visit):
    page = visit()
    page.add_init_script(WATCH)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.wait_for_timeout(300)  # A slide takes 200 ms.
    width = page.locator("#sidebar").bounding_box()["width"]
    assert page.evaluate("[...window.starts]") == [width]
    assert page.evaluate("window.slides") == []
    page.click("#close-sidebar")
    until(page, "window.starts.has(0)")
    assert page.evaluate("window.slides") == ["grid-template-columns"]
    assert len(page.evaluate("[...window.starts]")) > 2


def test_the_panel_shows_this_answer_and_the_tiers(visit, gateway):
    rest = threading.Event()
    gateway.answers = [Answer(["word "] * 60, pause_s=0.005, hold=rest)]
    page = visit()
    expect(page.locator("#panel-tiers li")).to_have_text(
        ["Device6 MiB, 60% full", "Host memory90 MiB, 7.5% full", "Disk1 GiB, 13% full"]
    )
    expect(page.locator("#panel-hits")).to_have_text("60% of all prompt tokens were found in it.")
    expect(page.locator("#panel-running")).to_have_text("2")
    ask(page, "Go", wait=False)
    expect(page.locator("#panel-speed")).to_contain_text("tokens/s")
    expect(page.locator("#panel-ttft")).to_have_text(re.compile(r"\d ?(ms|s)$"))
    expect(page.locator("#panel-spark path")).to_have_count(2)
    rest.set()
    expect(page.locator("#panel-prompt")).to_have_text("40 32 cached")
    gateway.status = None
    expect(page.locator("#panel-state")).to_have_text("The server does not answer.")


def test_conversations_can_be_taken_along(visit, tmp_path):
    page = visit()
    ask(page, "Keep this")
    page.hover("#conversations li")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export “Keep this”").click()
    assert download.value.suggested_filename == "Keep-this.md"
    download.value.save_as(tmp_path / "one.md")
    text = (tmp_path / "one.md").read_text()
    assert text == "# Keep this\n\n## You\n\nKeep this\n\n## Answer\n\nKeep this\n"
    with page.expect_download() as download:
        page.click("#export-all")
    download.value.save_as(tmp_path / "all.json")
    exported = json.loads(Path(tmp_path / "all.json").read_text())
    assert exported["format"] == "wicore-conversations"
    assert [message["text"] for message in exported["conversations"][0]["messages"]] == ["Keep this", "Keep this"]


def test_a_browser_without_room_is_told_of_and_the_answer_comes(visit):
    page = visit()
    page.evaluate("() => { IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceeded'); }; }")
    ask(page, "Hello")
    assert answer(page) == "Hello"
    expect(page.locator("#composer-error")).to_contain_text("The browser did not keep this")


def test_without_a_database_it_works_and_says_that_nothing_is_kept(browser, served, gateway):
    del gateway
    page = browser.new_context(locale="en-US").new_page()
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: { open() { throw new Error('no'); } } })")
    page.goto(served[0])
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#no-conversations")).to_contain_text("keeps no data")
    ask(page, "Hello")
    assert answer(page) == "Hello"
    page.context.close()
