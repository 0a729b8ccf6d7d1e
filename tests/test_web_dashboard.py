"""The dashboard in a real browser, and the arithmetic behind its lines."""

import pytest
from playwright.sync_api import expect
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tests.web_gateway import status_page

pytest_plugins = ["tests.web_pages"]

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1)


def chart(page, title):
    return page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True))


@pytest.fixture
def latencies():
    registry = CollectorRegistry()
    names = ("ttft", "tpot", "request")
    return registry, {
        name: Histogram(f"wicore_gateway_{name}_seconds", "Seconds.", ["model"], buckets=BUCKETS, registry=registry)
        for name in names
    }


def test_lines_are_drawn_from_status_and_metrics(visit, gateway, latencies):
    registry, histograms = latencies
    histograms["ttft"].labels("a").observe(0.01)
    gateway.metrics = generate_latest(registry).decode()
    page = visit("/dashboard")
    expect(page.locator("#state")).to_have_text("Ready")
    gateway.status = status_page(generated=1600, found=900, missed=500, running=5)
    for _ in range(100):
        histograms["ttft"].labels("b").observe(0.3)
    gateway.metrics = generate_latest(registry).decode()
    expect(chart(page, "Requests").locator(".legend")).to_have_text("Running5Waiting1")
    # 100 observations between 0.25 and 0.5: evenly spread, half of them lie below 0.375.
    expect(chart(page, "Time to first token").locator(".legend")).to_contain_text("median375 ms95 of 100488 ms")
    # Of 400 prompt tokens more, the device had 150, the host 100, the disk 50.
    expect(chart(page, "Cache hits").locator(".legend")).to_have_text("Device37.5%Host memory25%Disk12.5%")
    speed = float(chart(page, "Tokens per second").locator(".legend strong").first.inner_text().split("/")[0])
    assert 60 <= speed < 350  # 600 tokens in one poll of two seconds or more, in the ten seconds that count
    expect(page.locator("#tiles")).to_contain_text("Running5")
    expect(page.locator("#models tr")).to_have_text("wicore1Ready · onnx")
    expect(page.get_by_title("executor = 'onnx'")).to_have_text("Ready · onnx")
    expect(page.locator("#outcomes tr")).to_have_text(["stop20", "length3", "cancelled1", "queue_full2"])
    expect(chart(page, "Requests").locator("path.line")).to_have_count(2)


def test_the_servers_words_are_in_the_persons_language(visit, gateway):
    gateway.status = status_page(missed=400)
    gateway.status["load"]["requests_total"] = {"length": 3, "a_new_one": 1}
    gateway.status["cache"]["reasons"] = [
        {"reason": "never computed, or given up by every tier", "count": 400, "unit": "tokens"},
        {"reason": "constructor", "count": 1, "unit": "times"},
    ]
    page = visit("/dashboard", locale="zh-CN", viewport={"width": 1280, "height": 800})
    expect(page.locator("#outcomes tr")).to_have_text(["达到长度上限3", "a_new_one1", "queue_full2"])
    expect(page.locator("#reasons tr")).to_have_text(["从未计算过，或已被各层淘汰400 词元", "constructor1 次"])
    numbers = page.locator("#reasons td:last-child")
    assert numbers.first.evaluate("cell => getComputedStyle(cell).whiteSpace") == "nowrap"


def test_times_without_an_answer_are_gaps(visit, gateway):
    page = visit("/dashboard")
    lines = chart(page, "Requests").locator("path.line.series-1")
    expect(lines).to_have_count(1)
    gateway.status = None
    expect(page.locator("#state")).to_have_text("No answer")
    gateway.status = status_page()
    expect(lines).to_have_count(2)


def test_it_can_be_paused_and_goes_on(visit, gateway):
    page = visit("/dashboard")
    expect(page.locator("#tiles")).to_contain_text("Running2")
    page.click("#pause")
    expect(page.locator("#about")).to_contain_text("Paused at")
    gateway.status = status_page(running=7)
    page.wait_for_timeout(2500)
    expect(page.locator("#tiles")).to_contain_text("Running2")
    page.click("#pause")
    expect(page.locator("#tiles")).to_contain_text("Running7")


def test_values_can_be_read_with_mouse_and_keyboard(visit):
    page = visit("/dashboard")
    plot = chart(page, "Requests").locator(".plot")
    expect(page.locator("#state")).to_have_text("Ready")
    plot.hover()
    expect(plot.locator(".tooltip")).to_contain_text("Running2")
    page.mouse.move(0, 0)
    expect(plot.locator(".tooltip")).to_be_hidden()
    plot.focus()
    page.keyboard.press("ArrowLeft")
    expect(plot.locator(".tooltip")).to_contain_text("Waiting1")
    page.keyboard.press("Escape")
    expect(plot.locator(".tooltip")).to_be_hidden()
    assert "Running 2, Waiting 1" in plot.get_attribute("aria-label")


def test_a_server_that_is_not_ready_says_why(visit, gateway):
    gateway.status = status_page() | {"ready": False, "reason": "Triton is loading wicore", "load": None, "cache": None}
    page = visit("/dashboard")
    expect(page.locator("#state")).to_have_text("Not ready")
    expect(page.locator("#trouble")).to_have_text("Triton is loading wicore.")
    expect(page.locator("#tiles")).to_contain_text("Running–")


def test_a_key_is_asked_for_once(visit, gateway):
    gateway.key = "sk-right"
    page = visit("/dashboard")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.wait_for_timeout(2500)
    expect(page.locator("#key-dialog")).to_be_hidden()
    page.click("#give-key")
    page.keyboard.type("sk-right")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#give-key")).to_be_hidden()


def evaluate(page, module, expression):
    return page.evaluate(f"import(new URL('web/{module}', document.baseURI)).then((m) => {expression})")


def test_the_text_format_of_prometheus_is_understood(visit):
    page = visit("/dashboard")
    text = '# HELP a b\na{x="1,}\\"\\n\\\\",y="z"} 2 1700000000\na 3e2\nb_bucket{le="+Inf"} 4\nbad line here\n\nc NaN\n'
    families = page.evaluate(
        """(text) => import(new URL("web/common/prometheus.js", document.baseURI)).then((m) =>
             Object.fromEntries([...m.parseMetrics(text)].map(([name, samples]) => [name, samples])))""",
        text,
    )
    assert families["a"] == [{"labels": {"x": '1,}"\n\\', "y": "z"}, "value": 2}, {"labels": {}, "value": 300}]
    assert families["b_bucket"] == [{"labels": {"le": "+Inf"}, "value": 4}]
    assert families.keys() == {"a", "b_bucket"}


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ("[[1, 0], [2, 10], [Infinity, 10]]", 0.5, 1.5),
        ("[[1, 10], [2, 10], [Infinity, 10]]", 0.5, 0.5),
        ("[[1, 0], [2, 0], [Infinity, 4]]", 0.99, 2),
        ("[[1, 0], [Infinity, 0]]", 0.5, None),
        ("[[1, 90], [2, 100], [Infinity, 100]]", 0.95, 1.5),
    ],
)
def test_quantiles_of_histograms(visit, buckets, share, value):
    assert evaluate(visit("/dashboard"), "common/prometheus.js", f"m.quantile({buckets}, {share})") == value


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (0, [0, 1]),
        (1, [0, 0.25, 0.5, 0.75, 1]),
        (7, [0, 2, 4, 6, 8]),
        (0.13, [0, 0.05, 0.1, 0.15]),
        (4, [0, 1, 2, 3, 4]),
    ],
)
def test_axes_have_round_ticks(visit, highest, ticks):
    assert evaluate(visit("/dashboard"), "dashboard/chart.js", f"m.niceTicks({highest})") == ticks
