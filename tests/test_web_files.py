"""The files of the pages: how they are served, and what holds for all of them. No browser is needed."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from wicore_backend.gateway.web import CONTENT_SECURITY_POLICY, add_pages

FILES = Path(__file__).parents[1] / "wicore_backend" / "gateway" / "web" / "static"
VENDORED = {"marked.esm.js": "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de"}
OWN_SCRIPTS = sorted(path for path in FILES.rglob("*.js") if path.parent.name != "vendor")
PAGES = sorted(FILES.glob("*.html"))


@pytest.fixture(scope="module")
def client():
    app = Starlette()
    add_pages(app)
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/dashboard", "/web/chat/main.js", "/web/nothing.js"])
def test_every_answer_confines_the_page(client, path):
    headers = client.get(path).headers
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_the_policy_allows_no_source_but_the_server_itself():
    policy = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "*" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY


def test_pages_and_scripts_come_with_their_types(client):
    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/dashboard", "text/html; charset=utf-8"),
        ("/web/chat/main.js", "text/javascript; charset=utf-8"),
        ("/web/styles/base.css", "text/css; charset=utf-8"),
        ("/web/icon.svg", "image/svg+xml"),
    ):
        response = client.get(path)
        assert (response.status_code, response.headers["content-type"]) == (200, kind), path


def test_a_copy_that_is_still_right_is_not_sent_again(client):
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'W/{first.headers["etag"]}, "other"'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert first.headers["cache-control"] == "no-cache"


def test_files_are_compressed_for_those_who_take_it(client):
    with client.stream("GET", "/web/vendor/marked.esm.js", headers={"Accept-Encoding": "gzip"}) as response:
        assert gzip.decompress(b"".join(response.iter_raw())) == (FILES / "vendor" / "marked.esm.js").read_bytes()
    plain = client.get("/web/vendor/marked.esm.js", headers={"Accept-Encoding": "identity"})
    assert plain.content == (FILES / "vendor" / "marked.esm.js").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/../pages.py",
        "/web/%2e%2e/pages.py",
        "/web/..%2fpages.py",
        "/web//etc/passwd",
        "/web/vendor/README.md",
    ],
)
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_only_reading_is_possible(client):
    assert client.head("/").status_code == 200
    assert client.post("/").status_code == client.delete("/web/icon.svg").status_code == 405


@pytest.mark.parametrize("name", VENDORED)
def test_vendored_files_are_what_their_projects_published(name):
    assert hashlib.sha256((FILES / "vendor" / name).read_bytes()).hexdigest() == VENDORED[name]
    assert name in (FILES / "vendor" / "README.md").read_text()
    assert "MIT" in (FILES / "vendor" / "marked.LICENSE").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_no_inline_scripts_styles_or_handlers(page):
    html = page.read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", html) == []
    assert re.findall(r'(?:src|href)="(?:https?:)?//', html) == []


@pytest.mark.parametrize("script", OWN_SCRIPTS, ids=lambda path: path.relative_to(FILES).as_posix())
def test_scripts_never_turn_text_into_markup_or_code(script):
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|srcdoc|DOMParser"
        r"|document\.write|\beval\(|new Function"
    )
    assert re.findall(forbidden, script.read_text()) == []


def test_imports_and_files_that_pages_name_exist():
    for script in OWN_SCRIPTS:
        for name in re.findall(r'from "(\.[^"]+)"', script.read_text()):
            assert (script.parent / name).is_file(), f"{script.name} imports {name}"
    for page in PAGES:
        for name in re.findall(r'(?:src|href)="web/([^"]+)"', page.read_text()):
            assert (FILES / name).is_file(), f"{page.name} names {name}"


def table(language):
    """The texts of a language, read as the browser would: one `name: "text"` a line."""
    source = (FILES / "common" / "strings.js").read_text()
    body = re.search(rf"const {language} = {{(.*?)^}};", source, re.DOTALL | re.MULTILINE).group(1)
    return dict(re.findall(r'^  (\w+): "(.*)",$', body, re.MULTILINE))


def test_both_languages_have_all_texts_with_the_same_places():
    english, chinese = table("en"), table("zh")
    assert english.keys() == chinese.keys()
    assert len(english) > 150
    for name, text in english.items():
        assert text.strip(), name
        assert sorted(re.findall(r"{(\w+)}", text)) == sorted(re.findall(r"{(\w+)}", chinese[name])), name


def test_no_text_is_left_in_english():
    same = {"s", "ms"}
    for name, text in table("zh").items():
        assert name in same or re.search(r"[\u4e00-\u9fff]|^{", text), f"{name}: {text}"


def test_every_text_is_used_and_every_use_has_a_text():
    names = set(table("en"))
    used = set()
    for page in PAGES:
        used |= set(re.findall(r'data-t(?:-\w+)?="(\w+)"', page.read_text()))
    sources = "\n".join(path.read_text() for path in OWN_SCRIPTS if path.name != "strings.js")
    direct = set(re.findall(r'\bt\("(\w+)"', sources))
    assert (used | direct) <= names, sorted((used | direct) - names)
    # Others are put together, or stand in lists: they are at least named somewhere.
    quoted = set(re.findall(r'"(\w+)"', sources))
    stems = [stem for stem in re.findall(r"t\(`(\w*)\$", sources) if stem]
    ends = re.findall(r"t\(`\$\{\w+\}(\w+)`", sources)
    unused = {
        name
        for name in names - used - direct - quoted
        if not any(name.startswith(stem) for stem in stems) and not any(name.endswith(end) for end in ends)
    }
    assert unused == set()


@pytest.mark.parametrize("page", ["/", "/dashboard"])
def test_pages_share_their_head_and_only_whole_pages_are_served(client, page):
    head = client.get(page).text.partition("</head>")[0]
    assert head.count('<meta charset="utf-8">') == head.count("<title>") == head.count("web/theme.js") == 1
    assert head.count('rel="stylesheet"') == 2
    assert "<!--" not in head
    assert client.get("/web/head.html").status_code == 404
