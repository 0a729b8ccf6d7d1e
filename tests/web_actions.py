"""What a person does on the chat page, for its tests."""

from __future__ import annotations

import time
from typing import Any


def ask(page: Any, question: str, *, wait: bool = True) -> None:
    """Types a question and sends it; waits until the answer has ended, unless told not to."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector("#send:not([hidden])")
        page.wait_for_selector(".message[aria-busy=true]", state="detached")


def answer(page: Any) -> str:
    """The text of the last answer."""
    return str(page.locator(".message.assistant .prose").last.inner_text())


def until(page: Any, expression: str, *, timeout_s: float = 10) -> None:
    """Waits until something is true in the page.

    Playwright's own way to wait makes code of text, which the page's policy stops.
    """
    end = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(20)
