"""The chat page and the dashboard against the whole server with the demo model, in a real browser."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from scripts.serving.gateway import Gateway, GatewayOptions
from tests.web_actions import answer, ask

pytest_plugins = ["tests.web_pages"]

PICTURE = Path(__file__).parents[2] / "client" / "wicore_client" / "assets" / "shapes.png"


@pytest.fixture(scope="module")
def gateway_url(server, installation, tmp_path_factory):
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    with Gateway(GatewayOptions(port=0), installation, server.urls, log=log) as gateway:
        yield gateway.url


@pytest.fixture
def page(browser, gateway_url):
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 800})
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto(gateway_url)
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#model:not([hidden])")
    yield page
    context.close()


def test_a_conversation_about_a_picture(page):
    page.set_input_files("#files", PICTURE)
    expect(page.locator("#thumbnails img")).to_have_count(1)
    ask(page, "Describe this picture.")
    assert "red circle" in answer(page).lower()
    figures = page.locator(".message.assistant .metrics")
    expect(figures).to_contain_text("first token")
    ask(page, "What is 12 + 7?")
    assert "19" in answer(page)
    expect(figures.last).to_contain_text(re.compile(r"[1-9]\d* of \d+ prompt tokens from the cache"))


def test_a_long_answer_is_stopped_and_the_server_goes_on(page):
    ask(page, "Count from 1 to 300.", wait=False)
    expect(page.locator(".prose")).to_contain_text("3", timeout=30_000)
    page.keyboard.press("Escape")
    expect(page.locator(".message.assistant .state")).to_have_text("Stopped.")
    ask(page, "What is 5 + 6?")
    assert "11" in answer(page)


def test_the_dashboard_draws_what_the_server_counts(page, gateway_url):
    ask(page, "What is 3 + 4?")
    page.goto(f"{gateway_url}/dashboard")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#about")).to_contain_text("2.51")
    expect(page.locator("#tiles")).to_contain_text(re.compile(r"Cache hits\d"))
    expect(page.locator(".chart path.line").first).to_be_attached()
    expect(page.locator("#outcomes")).to_contain_text("stop")
    tiers = page.locator(".chart", has=page.get_by_role("heading", name="Tiers", exact=True)).locator(".legend")
    expect(tiers).to_contain_text(re.compile(r"Device[\d.]+%"))
