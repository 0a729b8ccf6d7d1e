"""Pictures on the chat page, in a real browser: chosen, pasted or dropped, made small, sent, kept."""

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.web_actions import answer, ask, until

pytest_plugins = ["tests.web_pages"]


def picture(width=64, height=48, *, kind="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, kind, **options)
    return file.getvalue()


def sent(gateway, number=0):
    """The pictures of the latest request, opened."""
    parts = [part for part in gateway.requests[-1]["messages"][-1]["content"] if part["type"] == "image_url"]
    head, data = parts[number]["image_url"]["url"].split(",", 1)
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


def give(page, event, data, *, name="red.png", kind="image/png"):
    """Pastes or drops a file, as the browser would."""
    page.evaluate(
        """([event, data, name, kind]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type: kind }));
          const made = event === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
            : new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true });
          document.getElementById("question").dispatchEvent(made);
        }""",
        [event, base64.b64encode(data).decode(), name, kind],
    )


def test_a_chosen_picture_is_shown_sent_and_kept(visit, gateway):
    page = visit()
    page.set_input_files("#files", {"name": "red.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator("#thumbnails img")).to_have_count(1)
    ask(page, "What is this?")
    assert gateway.requests[-1]["messages"][-1]["content"][1] == {"type": "text", "text": "What is this?"}
    head, image = sent(gateway)
    assert (head, image.size, image.getpixel((5, 5))[:3]) == ("data:image/png;base64", (64, 48), (200, 30, 30))
    expect(page.locator("#thumbnails")).to_be_hidden()
    page.reload()
    shown = page.locator(".message.user img")
    expect(shown).to_have_attribute("alt", "Picture 1")
    until(page, "document.querySelector('.message.user img').naturalWidth === 64")


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(visit, gateway, event):
    page = visit()
    if event == "drop":
        give(page, "dragover", picture())
        expect(page.locator("#drop")).to_be_visible()
    give(page, event, picture(80, 20))
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#thumbnails img")).to_have_count(1)
    page.click("#send")
    expect(page.locator(".message.assistant .metrics")).to_be_visible()
    assert sent(gateway)[1].size == (80, 20)
    assert answer(page) == "(picture)"


def test_cells_of_a_table_are_pasted_as_text(visit):
    page = visit()
    page.evaluate(
        """() => {
          const transfer = new DataTransfer();
          transfer.setData("text/plain", "a\\tb");
          transfer.items.add(new File([new Uint8Array(8)], "cells.png", { type: "image/png" }));
          const paste = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
          window.wasLeftToTheBrowser = document.getElementById("question").dispatchEvent(paste);
        }"""
    )
    assert page.evaluate("window.wasLeftToTheBrowser")
    expect(page.locator("#composer-error")).to_be_hidden()


def test_large_photographs_are_made_small_and_lose_what_the_camera_wrote(visit, gateway):
    exif = Image.Exif()
    exif[0x010E] = "taken at a secret place"
    page = visit()
    photograph = picture(4000, 1000, kind="JPEG", exif=exif)
    assert b"secret" in photograph
    page.set_input_files("#files", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph})
    expect(page.locator("#thumbnails img")).to_have_count(1)
    ask(page, "Where?")
    head, image = sent(gateway)
    assert (head, image.size) == ("data:image/jpeg;base64", (1792, 448))
    assert not image.getexif()


def test_what_is_no_picture_is_refused_by_its_name(visit, gateway):
    page = visit()
    give(page, "drop", b"GIF89a but not really", name="odd.gif", kind="image/gif")
    expect(page.locator("#composer-error")).to_have_text("odd.gif is no picture that this browser can read.")
    expect(page.locator("#send")).to_be_disabled()
    assert gateway.requests == []


def test_a_picture_can_be_removed_before_it_is_sent(visit, gateway):
    page = visit()
    for name in ("one.png", "two.png"):
        give(page, "paste", picture(), name=name)
        expect(page.locator(f"button[aria-label='Remove {name}']")).to_be_visible()
    page.get_by_role("button", name="Remove one.png").click()
    expect(page.locator("#thumbnails img")).to_have_count(1)
    page.get_by_role("button", name="Remove two.png").click()
    ask(page, "Only words")
    assert gateway.requests[-1]["messages"][-1]["content"] == "Only words"


def test_a_message_takes_so_many_pictures_and_no_more(visit):
    page = visit()
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": picture(8, 8)} for n in range(10)]
    page.set_input_files("#files", files)
    expect(page.locator("#composer-error")).to_have_text("A message takes up to 8 pictures.")
    expect(page.locator("#thumbnails img")).to_have_count(8)


def test_pictures_stay_with_a_question_that_is_edited(visit, gateway):
    page = visit()
    give(page, "paste", picture())
    expect(page.locator("#thumbnails img")).to_have_count(1)
    ask(page, "What is it?")
    page.press("#question", "ArrowUp")
    expect(page.locator("#thumbnails img")).to_have_count(1)
    ask(page, "What colour is it?")
    assert sent(gateway)[1].size == (64, 48)
    assert len(gateway.requests[-1]["messages"]) == 1
