"""Hostile answers, names and data on the pages, in a real browser: nothing becomes script, loads or leaves."""

import pytest
from playwright.sync_api import expect

from tests.web_actions import ask
from tests.web_gateway import Answer, status_page

pytest_plugins = ["tests.web_pages"]

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg onload=window.pwned=1><script>window.pwned=1</script></svg>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](java\tscript:window.pwned=1)",
    "[d](data:text/html,<script>opener.pwned=1</script>) [e](vbscript:x) [f](&#106;avascript:window.pwned=1)",
    '![i](https://evil.example/pixel.png) ![j](x"onerror="window.pwned=1)',
    '[k](https://x.example/"onmouseover="window.pwned=1 "title" onclick="window.pwned=1")',
    '<https://evil.example/"><img src=x onerror=window.pwned=1>>',
    '```html"><img src=x onerror=window.pwned=1>\n<script>window.pwned = 1</script>\n```',
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <script>window.pwned=1</script> | [x](javascript:x) |",
    "<style>body { display: none }</style><link rel=stylesheet href=//evil.example/x.css><base href=//evil.example/>",
    "<form action=//evil.example><input name=key><button>Log in</button></form>",
    "&lt;script&gt;window.pwned = 1&lt;/script&gt; &#60;img src=x onerror=window.pwned=1&#62; &#x110000; &#0;",
    "- [ ] <input onfocus=window.pwned=1 autofocus>\n\n> <video><source onerror=window.pwned=1></video>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.pwned=1&gt;'>",
    "# <a href=javascript:window.pwned=1>x</a>\n\n<details open ontoggle=window.pwned=1>",
    "[ref]: javascript:window.pwned=1\n\n[ref] and [text][ref]",
    "\u202egnp.exe \u0000\ufffe \ud83d",
]

ALLOWED = {
    "A",
    "BLOCKQUOTE",
    "BR",
    "BUTTON",
    "CODE",
    "DEL",
    "DIV",
    "EM",
    "H3",
    "H4",
    "H5",
    "H6",
    "HR",
    "LI",
    "OL",
    "P",
    "PATH",
    "PRE",
    "SPAN",
    "STRONG",
    "SVG",
    "TABLE",
    "TBODY",
    "TD",
    "TH",
    "THEAD",
    "TR",
    "UL",
}

SEEN = """() => {
  const elements = [...document.querySelectorAll(".prose *")];
  return {
    tags: [...new Set(elements.map((element) => element.tagName.toUpperCase()))],
    handlers: elements.flatMap((element) => element.getAttributeNames()).filter((name) => /^on|^style$/.test(name)),
    links: elements.filter((element) => element.tagName === "A").map((element) => [element.protocol, element.rel]),
    pwned: window.pwned ?? null,
  };
}"""


@pytest.fixture(scope="module")
def prose(browser, served):
    """Shows a text as an answer would be, in one page for all of them, which asks nobody else for anything."""
    url, gateway = served
    gateway.reset()
    page = browser.new_context(locale="en-US").new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    page.goto(url)
    page.wait_for_selector("html[data-ready]")

    def show(pieces):
        page.click("#new")
        gateway.answers = [Answer(pieces)]
        ask(page, "Go")
        return page

    yield show
    assert [one for one in asked if not one.startswith(url) and not one.startswith("blob:")] == []
    page.context.close()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_answer_becomes_script_or_loads_anything(prose, text):
    page = prose([text[i : i + 7] for i in range(0, len(text), 7)])  # also as half-finished markup
    seen = page.evaluate(SEEN)
    assert set(seen["tags"]) <= ALLOWED
    assert seen["handlers"] == []
    assert seen["pwned"] is None
    for protocol, rel in seen["links"]:
        assert protocol in ("http:", "https:", "mailto:")
        assert "noopener" in rel


def test_html_is_shown_as_the_text_that_it_is(prose):
    page = prose(["Use <b>bold</b> and &lt;i&gt; and `&amp;` here.\n\n<div>\nblock\n</div>"])
    assert page.locator(".prose").last.inner_text().split("\n\n") == [
        "Use <b>bold</b> and <i> and `&amp;` here.".replace("`", ""),
        "<div>\nblock\n</div>",
    ]


@pytest.mark.parametrize(
    "text",
    [">" * 4000, "[" * 20000, "- " * 5000, "*a " * 8000, "`" * 20001, "|" * 9000 + "\n" + "|-" * 4000, "a" * 200_000],
    ids=["quotes", "brackets", "lists", "stars", "ticks", "tables", "one word"],
)
def test_answers_made_to_choke_the_page_are_shown(prose, text):
    page = prose([text])
    expect(page.locator(".message.assistant .metrics")).to_be_visible()
    assert page.locator(".prose").last.evaluate("(element) => element.childElementCount") > 0
    assert page.locator(".prose").last.evaluate("(e) => e.getBoundingClientRect().width < 1000")


def test_markdown_of_an_answer_is_rendered(prose):
    page = prose(
        ["## Title\n\n1. a\n2. b\n   - c\n\n| x | y |\n|---|--:|\n| 1 | 2 |\n\n~~no~~ *yes* https://example.org"]
    )
    assert page.locator(".prose h4").inner_text() == "Title"
    assert page.locator(".prose ol > li").count() == 2
    assert page.locator(".prose ol ul li").inner_text() == "c"
    assert page.locator(".prose td.right").inner_text() == "2"
    assert page.locator(".prose a").get_attribute("href") == "https://example.org/"
    assert page.locator(".prose a").get_attribute("target") == "_blank"


def test_names_of_conversations_pictures_and_models_are_text(visit, gateway):
    gateway.models = ["<img src=x onerror=window.pwned=1>"]
    page = visit()
    ask(page, "<img src=x onerror=window.pwned=1>")
    assert page.locator("#title").inner_text() == "<img src=x onerror=window.pwned=1>"
    assert page.locator("#conversations img, .message img, #model img").count() == 0
    assert page.evaluate("window.pwned ?? null") is None


def test_what_the_server_says_of_itself_is_text(visit, gateway):
    evil = "<img src=x onerror=window.pwned=1>"
    status = status_page()
    status["models"][0]["name"] = status["server"] = evil
    status["executors"] = [{"model": evil, "name": evil, "reason": evil}]
    status["cache"]["reasons"] = [{"reason": evil, "count": 1, "unit": evil}]
    gateway.status = status
    gateway.metrics = f'wicore_gateway_ttft_seconds_bucket{{le="{evil}"}} 1\n{{}} nonsense\n'
    page = visit("/dashboard")
    expect(page.locator("#models td").first).to_have_text(evil)
    expect(page.locator("#models td").last).to_have_text(f"Ready · {evil}")
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.pwned ?? null") is None


def test_the_policy_holds_in_the_browser(browser, served):
    page = browser.new_context().new_page()
    page.goto(served[0])
    page.wait_for_selector("html[data-ready]")
    allowed = page.evaluate(
        """async () => {
          const works = async (action) => { try { await action(); return true; } catch { return false; } };
          return {
            html: await works(() => { document.createElement("div").innerHTML = "<b>x</b>"; }),
            policy: await works(() => trustedTypes.createPolicy("mine", { createHTML: (text) => text })),
            elsewhere: await works(() => fetch("https://example.org/")),
            here: await works(() => fetch("status")),
          };
        }"""
    )
    assert allowed == {"html": False, "policy": False, "elsewhere": False, "here": True}
    page.context.close()
