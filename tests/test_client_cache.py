"""`wicore cache`: what the server's metrics say, tier by tier, from the engine's statistics to 80 columns."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from wicore_client import Client, InvalidArgument, Metric, cache_table
from wicore_client.cache import CacheReport, reports, since
from wicore_client.cli import main
from wicore_client.metrics import parse

from tests import fake_triton
from tests.fake_triton import FakeTriton
from tests.test_triton_series import COLD, STATISTICS
from wicore_backend.engine.health import Health
from wicore_backend.engine.plan import SchedulerCounts
from wicore_backend.engine.statistics import BlockUsage, EngineStatistics, TierUsage
from wicore_backend.hmt.cold_tier import ColdCounts
from wicore_backend.hmt.host_tier import TierCounts
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import Outcome
from wicore_backend.triton.series import FAMILIES

GLOBAL, LOCAL = LayerGroup.GLOBAL, LayerGroup.LOCAL
BUSY = replace(
    STATISTICS,
    blocks={GLOBAL: BlockUsage(100, 44, 166, 1420, 65536), LOCAL: BlockUsage(0, 17, 45, 442, 196608)},
    host={
        GLOBAL: TierUsage(68, 100, TierCounts(1397, 23, 1329, 0, 66)),
        LOCAL: TierUsage(27, 27, TierCounts(1, 2, 3, 4)),
    },
    nvme=replace(
        COLD,
        groups={
            GLOBAL: ColdCounts(Counter({Outcome.DONE: 580, Outcome.LATE: 2}), Counter({Outcome.DONE: 9}), 5, 1, 6),
            LOCAL: ColdCounts(restores=Counter({Outcome.DONE: 7, Outcome.CORRUPT: 3, Outcome.MISSING: 1})),
        },
        held={GLOBAL: 580, LOCAL: 161},
        capacity=4852,
        spill_bytes_per_second=2.0**28,
        restore_bytes_per_second=1.25 * 2**30,
        restore_latency_s=0.0047,
    ),
    scheduler=SchedulerCounts(
        prefix_hit_tokens=9_536,
        prefix_missed_tokens=54_715,
        window_missing_tokens=14_272,
        restores=3,
        restored_tokens=4_768,
        restores_declined=7,
        restores_without_room=2,
        host_hit_tokens=3_500,
        nvme_hit_tokens=2_036,
    ),
)


def page(statistics: EngineStatistics, model: str = "wicore_gemma3") -> str:
    """The metrics page as Triton has it, the labels in an order of its own."""
    lines = []
    for family in FAMILIES:
        for labels, value in family.read(statistics, Health(True)):
            listed = ",".join(f'{key}="{text}"' for key, text in sorted({**labels, "model": model}.items()))
            lines.append(f"{family.name}{{{listed}}} {value}")
    return "\n".join(lines)


def report_of(statistics: EngineStatistics) -> CacheReport:
    (report,) = reports(parse(page(statistics)))
    return report


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTriton]:
    monkeypatch.setattr(fake_triton, "METRICS", page(BUSY))
    with FakeTriton() as fake:
        monkeypatch.setenv("WICORE_URL", f"127.0.0.1:{fake.ports['grpc']}")
        yield fake


def cache(server: FakeTriton, *arguments: str) -> int:
    return main(["cache", "--metrics-port", str(server.ports["http"]), *arguments])


def test_a_report_says_what_the_engine_has_counted():
    report = report_of(BUSY)
    device, host, nvme = report.tiers
    assert [tier.tier for tier in report.tiers] == ["device", "host", "nvme"]
    of = {(tier.tier, group.group): group for tier in report.tiers for group in tier.groups}
    assert (of["device", "global"].used, of["device", "global"].capacity) == (144, 166)
    assert (of["host", "local"].stored, of["host", "local"].loaded, of["host", "local"].refused) == (1, 2, 4)
    assert (of["nvme", "global"].evicted, of["nvme", "global"].refused, of["nvme", "global"].capacity) == (5, 8, None)
    assert (of["nvme", "all"].used, of["nvme", "all"].capacity, of["nvme", "all"].stored) == (741, 4852, None)
    assert device.used_bytes == 144 * 65536 + 17 * 196608
    assert (device.stored_bytes, host.stored_bytes) == (None, 1397 * 65536 + 196608)
    assert nvme.loaded_bytes == 9 * 65536 + 7 * 196608
    assert (nvme.store_bytes_per_second, nvme.load_latency_s) == (2.0**28, 0.0047)
    assert nvme.errors == {"the disk, or a quota of it, was full": 39}
    assert (nvme.used_disk_bytes, nvme.disk_bytes, host.disk_bytes) == (37, 36, None)
    assert (report.found_tokens, report.missed_tokens) == (9_536, 54_715)
    assert (report.restores, report.restored_tokens) == (3, 4_768)
    assert {tier.tier: tier.found_tokens for tier in report.tiers} == BUSY.hit_tokens
    assert (of["host", "global"].written_behind, of["nvme", "global"].written_behind) == (66, None)


def test_no_tier_has_found_less_than_nothing_when_the_page_is_read_while_it_changes():
    half = replace(BUSY.scheduler, prefix_hit_tokens=5_000)
    assert [tier.found_tokens for tier in report_of(replace(BUSY, scheduler=half)).tiers] == [0, 3_500, 2_036]


def test_reasons_add_up_to_what_was_missed_and_the_most_frequent_comes_first():
    reasons = report_of(BUSY).reasons
    assert [(reason.count, reason.unit) for reason in reasons] == [
        (40_443, "tokens"),
        (14_272, "tokens"),
        (5, "times"),
        (2, "times"),
        (3, "blocks"),
        (1, "blocks"),
    ]
    assert "window" in reasons[1].reason
    assert ["faster" in reasons[2].reason, "no room" in reasons[3].reason] == [True, True]
    assert ["damaged" in reasons[4].reason, "gone" in reasons[5].reason] == [True, True]
    assert not report_of(replace(BUSY, nvme=None, scheduler=SchedulerCounts())).reasons


def test_the_table_fits_a_terminal(server, capsys):
    assert cache(server) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines()]
    assert ["device", "global", "144", "166", "87%", "1,420"] in rows
    assert ["host", "global", "68", "100", "68%", "1,397", "23", "1,329", "0", "66"] in rows
    assert ["all", "741", "4,852", "15%"] in rows
    assert "64,251 prompt tokens, 9,536 (15%) of them found in the cache" in out
    assert "by tier: device 4,000, host 3,500, nvme 2,036\n" in out
    assert "4,768 of these by prompts that waited for the disk, 3 times\n" in out
    assert re.search(r"nvme .* 256 MiB/s +1\.2 GiB/s +4\.7 ms\n", out)
    assert "39 times   nvme: the disk, or a quota of it, was full" in out


def test_columns_stand_apart_however_long_what_they_hold():
    tier = replace(report_of(BUSY).tiers[2], load_latency_s=0.0175, load_bytes_per_second=24.6 * 2**20)
    lines = list(cache_table.lines(replace(report_of(BUSY), tiers=(tier,)), seconds=None, every_tier=False))
    (line,) = (line for line in lines if line.startswith("nvme") and "/s" in line)
    assert line.endswith(" 24.6 MiB/s 17.5 ms")
    assert len(line) <= 80


def test_a_lossy_server_says_so_and_an_exact_one_does_not(server, capsys, monkeypatch):
    assert cache(server) == 0
    out = capsys.readouterr().out
    assert (
        "LOSSY: an answer keeps 256 tokens (kv_budget_tokens)\nof the blocks of answers: 51 left, 53 lost, 52 " in out
    )
    monkeypatch.setattr(fake_triton, "METRICS", page(replace(BUSY, bounded=None)))
    assert cache(server) == 0
    assert "LOSSY" not in capsys.readouterr().out


def test_numbers_of_any_size_stay_in_their_columns():
    huge = 10**12
    counts = TierCounts(huge, huge, huge, huge, huge)
    hits = SchedulerCounts(prefix_hit_tokens=3 * huge - 1, host_hit_tokens=huge - 1, nvme_hit_tokens=huge)
    statistics = replace(BUSY, host={GLOBAL: TierUsage(huge, huge, counts)}, scheduler=hits)
    report = report_of(statistics)
    lines = [*cache_table.lines(report, seconds=None, every_tier=True)]
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("host")).split()[1:5] == ["global", "1.0T", "1.0T", "100%"]
    assert max(map(len, cache_table.lines(report, seconds=1e-9, every_tier=True))) <= 80


def test_json_is_one_object(server, capsys):
    assert cache(server, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    (report,) = said["caches"]
    assert (said["seconds"], report["model"], report["missed_tokens"]) == (None, "wicore_gemma3", 54_715)
    assert [tier["tier"] for tier in report["tiers"]] == ["device", "host", "nvme"]


def test_one_tier_alone(server, capsys):
    assert cache(server, "--tier", "host", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["caches"]
    assert [tier["tier"] for tier in report["tiers"]] == ["host"]
    assert cache(server, "--tier", "nvme") == 0
    out = capsys.readouterr().out
    assert "device" not in out
    assert "by tier: nvme 2,036\n" in out


def test_a_tier_that_the_server_does_not_have_is_named_with_its_setting(server, capsys, monkeypatch):
    monkeypatch.setattr(fake_triton, "METRICS", page(replace(BUSY, nvme=None)))
    assert cache(server) == 0
    assert re.search(r"nvme +none; nvme_cache_path", capsys.readouterr().out)
    assert cache(server, "--tier", "nvme") == 1
    assert re.fullmatch(r"wicore: the server has no nvme tier;.* nvme_cache_path .*\n", capsys.readouterr().err)


def test_what_happened_in_a_while_is_the_difference_of_two_looks(server, capsys, monkeypatch):
    later = replace(BUSY, scheduler=replace(BUSY.scheduler, prefix_hit_tokens=10_000, prefix_missed_tokens=54_815))
    monkeypatch.setattr("time.sleep", lambda _: monkeypatch.setattr(fake_triton, "METRICS", page(later)))
    assert cache(server, "--over", "60") == 0
    out = capsys.readouterr().out
    assert "in 60 s\n564 prompt tokens, 464 (82%)" in out
    assert "by tier: device 464, host 0, nvme 0\n" in out
    assert re.search(r"host +global +68 +100 +68% +0 +0 +0 +0 +0\n", out)
    assert re.search(r"host +9\.3 MiB +0 B/s +0 B/s\n", out)


def test_a_server_that_started_anew_between_two_looks_counts_from_nothing():
    before = (Metric("a_total", {"x": "1"}, 10.0), Metric("b", {}, 3.0))
    after = (Metric("a_total", {"x": "1"}, 4.0), Metric("a_total", {"x": "2"}, 5.0), Metric("b", {}, 2.0))
    assert [metric.value for metric in since(before, after)] == [4.0, 5.0, 2.0]


def test_models_have_a_report_each(server, capsys, monkeypatch):
    monkeypatch.setattr(fake_triton, "METRICS", f"{page(BUSY, 'one')}\n{page(replace(BUSY, host={}), 'two')}")
    assert cache(server) == 0
    assert re.findall(r"^\w+ at", capsys.readouterr().out, re.MULTILINE) == ["one at", "two at"]


def test_no_metrics_is_a_readable_error(server, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for port in (unused.getsockname()[1], server.ports["grpc"]):
            assert main(["cache", "--metrics-port", str(port), "--timeout", "2"]) == 1
            err = capsys.readouterr().err
            assert err.startswith(f"wicore: no metrics at 127.0.0.1:{port}; ")
            assert "--metrics-port" in err
    monkeypatch.setattr(fake_triton, "METRICS", "nv_inference_count 3\n")
    assert cache(server) == 1
    assert "nothing of a KV cache" in capsys.readouterr().err
    with pytest.raises(InvalidArgument, match="metrics_port"):
        Client(metrics_port=None).metrics()


@pytest.mark.parametrize("arguments", [["--over", "0"], ["--over", "nan"], ["--over", "x"], ["--metrics-port", "0"]])
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["cache", *arguments])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("wicore: ")
    assert err.count("\n") == 1


def test_nonsense_on_the_page_is_passed_over(server, capsys, monkeypatch):
    nonsense = """
        wicore_tier_blocks{model="m\x1b[31m",tier="host",group="g\x1b[2J"} NaN
        wicore_tier_blocks{model="m\x1b[31m",tier="host",group="global"} 10
        wicore_tier_blocks_used{model="m\x1b[31m",tier="host",group="global"} many
        wicore_tier_blocks_used{model="m\x1b[31m",tier="host",group="local"} -3
        wicore_tier_spilled_blocks_total{model="m\x1b[31m",tier="host",group="global"} +Inf
        wicore_tier_blocks{model="m\x1b[31m",tier="moon",group="global"} 10
        wicore_tier_blocks{tier="host"
    """
    monkeypatch.setattr(fake_triton, "METRICS", nonsense)
    assert cache(server) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "moon" not in out
    assert re.search(r"host +global +10\n", out)
