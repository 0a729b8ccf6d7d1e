"""What the chat page does when something goes wrong, in a real browser."""

import threading

import pytest
from playwright.sync_api import expect

from tests.web_actions import answer, ask
from tests.web_gateway import Answer, Refusal

pytest_plugins = ["tests.web_pages"]


def state(page):
    return page.locator(".message.assistant .state").last


def test_a_limit_says_how_long_to_wait_and_lets_try_then(visit, gateway):
    refusal = Refusal(429, "60 requests a minute are yours.", "rate_limit_exceeded", {"Retry-After": "2"})
    gateway.answers = [refusal, Answer(["Now."])]
    page = visit()
    ask(page, "Again")
    expect(state(page)).to_contain_text("Too many requests for now. 60 requests a minute are yours. Possible again in")
    retry = state(page).get_by_role("button", name="Try again")
    expect(retry).to_be_disabled()
    expect(retry).to_be_enabled()
    retry.click()
    expect(page.locator(".prose")).to_have_text("Now.")
    expect(state(page)).to_be_hidden()
    assert len(gateway.requests) == 2


def test_a_server_that_is_not_ready_is_asked_again_by_itself(visit, gateway):
    gateway.answers = [Refusal(503, "Starting.", headers={"Retry-After": "1"}), Answer(["Here."])]
    page = visit()
    ask(page, "Hello", wait=False)
    expect(state(page)).to_contain_text("The server cannot answer right now. Starting. Trying again in")
    expect(page.locator(".prose")).to_have_text("Here.")
    expect(state(page)).to_be_hidden()


@pytest.mark.parametrize(
    ("locale", "words"),
    [
        ("en-US", "The server cannot answer right now. The inference server cannot be reached. Trying again in"),
        ("zh-CN", "服务器暂时无法回答。 无法连接推理服务器。"),
    ],
)
def test_the_servers_words_are_a_sentence_among_the_pages(visit, gateway, locale, words):
    gateway.answers = [Refusal(503, "the inference server cannot be reached", headers={"Retry-After": "100"})]
    page = visit(locale=locale)
    ask(page, "Hello", wait=False)
    expect(state(page)).to_contain_text(words)


def test_waiting_for_a_server_can_be_stopped(visit, gateway):
    gateway.answers = [Refusal(503, "Starting.", headers={"Retry-After": "100"})]
    page = visit()
    ask(page, "Hello", wait=False)
    expect(state(page)).to_contain_text("Trying again in")
    page.keyboard.press("Escape")
    expect(state(page)).to_have_text("Stopped.")
    assert len(gateway.requests) == 1


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Answer(["What came"], breaks=True), "The connection broke off. What had come is kept."),
        (
            Answer(["What came"], error={"message": "Triton left.", "type": "server_error", "code": "unavailable"}),
            "The server failed. Triton left.",
        ),
    ],
    ids=["cut off", "error event"],
)
def test_a_stream_that_breaks_keeps_what_came(visit, gateway, broken, words):
    gateway.answers = [broken, Answer(["The whole answer."])]
    page = visit()
    ask(page, "Tell me")
    expect(state(page).locator("p")).to_have_text(words)
    assert answer(page) == "What came"
    page.reload()
    expect(page.locator(".prose")).to_have_text("What came")
    state(page).get_by_role("button", name="Try again").click()
    expect(page.locator(".prose")).to_have_text("The whole answer.")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".prose")).to_have_text("What came")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            Refusal(400, "max_tokens: 0 is not at least 1."),
            "The server refused the request. max_tokens: 0 is not at least 1.",
        ),
        (Refusal(403, "Not that model."), "This key may not do that. Not that model."),
        (Refusal(413, "Over 20 MB."), "The message is too large for the server. Over 20 MB."),
        (Refusal(500, "A fault."), "The server failed. A fault."),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Refusal) else None,
)
def test_refusals_are_told_in_the_servers_own_words(visit, gateway, refusal, words):
    gateway.answers = [refusal]
    page = visit()
    ask(page, "Hello")
    expect(state(page).locator("p")).to_have_text(words)
    expect(state(page)).to_have_attribute("role", "alert")


def test_a_server_that_is_gone_is_named_as_such(visit):
    page = visit()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello")
    expect(state(page)).to_contain_text("The server cannot be reached.")


def test_an_answer_that_the_limit_of_tokens_ended_says_so(visit, gateway):
    gateway.answers = [Answer(["Cut"], finish="length")]
    page = visit()
    ask(page, "Write")
    expect(state(page)).to_have_text("The answer reached the limit of tokens.")


def test_a_page_that_was_closed_while_an_answer_came_keeps_its_beginning(visit, gateway):
    gateway.answers = [Answer(["The beginning"], hold=threading.Event())]
    page = visit()
    ask(page, "Go", wait=False)
    expect(page.locator(".prose")).to_have_text("The beginning")
    page.wait_for_timeout(2500)  # it is written down once a second
    page.reload()
    expect(page.locator(".prose")).to_have_text("The beginning")
    expect(state(page)).to_contain_text("The page was closed during this answer.")


def test_a_key_is_asked_for_kept_in_the_browser_and_used(visit, gateway):
    gateway.key = "sk-right"
    page = visit()
    ask(page, "Hello", wait=False)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_visible()
    expect(page.locator("#asked-key")).to_have_value("")
    page.keyboard.type("sk-right")
    page.keyboard.press("Enter")
    expect(page.locator(".prose")).to_have_text("Hello")
    expect(page.locator("#panel-tiers li")).to_have_count(3)
    assert page.evaluate("[localStorage.getItem('wicore.key'), sessionStorage.getItem('wicore.key')]") == [
        None,
        "sk-right",
    ]
    page.reload()
    ask(page, "Still me")
    assert answer(page) == "Still me"
    assert "sk-right" not in page.url


def test_a_key_is_remembered_only_if_asked_to(visit, gateway):
    gateway.key = "sk-right"
    page = visit()
    page.click("#open-settings")
    page.fill("#key", "sk-right")
    page.check("#remember-key")
    page.keyboard.press("Escape")
    assert page.evaluate("localStorage.getItem('wicore.key')") == "sk-right"
    page.click("#open-settings")
    page.uncheck("#remember-key")
    assert page.evaluate("localStorage.getItem('wicore.key')") is None


def test_who_gives_no_key_can_give_one_later(visit, gateway):
    gateway.key = "sk-right"
    page = visit()
    ask(page, "Hello", wait=False)
    page.get_by_role("button", name="Cancel").click()
    expect(state(page)).to_contain_text("The server wants a key.")
    state(page).get_by_role("button", name="Give a key").click()
    page.keyboard.type("sk-right")
    page.keyboard.press("Enter")
    expect(page.locator(".prose")).to_have_text("Hello")
