"""Fixtures of the tests of the pages: a real Chromium, and a stand-in for the gateway.

Test modules name this one in `pytest_plugins`. The browser lasts for a module, not longer: while Playwright's
synchronous interface runs, nothing else in the thread can use asyncio.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.web_gateway import FakeGateway, Served

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=20_000)  # A busy machine may take so long, and what is right takes less.
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeGateway]]:
    """A stand-in for the gateway, and where it is."""
    gateway = FakeGateway()
    with Served(gateway.app()) as url:
        yield url, gateway


@pytest.fixture
def gateway(served: tuple[str, FakeGateway]) -> FakeGateway:
    """The stand-in, as it was at first."""
    served[1].reset()
    return served[1]


@pytest.fixture
def visit(browser: Any, served: tuple[str, FakeGateway], gateway: FakeGateway) -> Iterator[Open]:
    """Opens a page in a browser that nothing is stored in, ready to be used: `visit("/dashboard", locale="zh-CN")`.

    A script that fails, or something that the page's security policy stops, fails the test.
    """
    del gateway  # reset first
    troubles: list[str] = []
    contexts = []

    def visit(path: str = "/", **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"{error.message}\n{error.stack}"))
        page.on("console", lambda message: troubles.extend([message.text] if _stopped(message.text) else []))
        page.goto(served[0] + path)
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def _stopped(text: str) -> bool:
    return "Content Security Policy" in text or "TrustedHTML" in text or "TrustedScript" in text
