"""Replay of block traces: reading, hits, tiers, the reference, the command line."""

import json
import random
from dataclasses import astuple
from pathlib import Path

import pytest

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.replay.__main__ import main
from wicore_backend.hmt.replay.simulator import named, replay
from wicore_backend.hmt.replay.tiers import CostModel, TierName, Tiers, TierSpec, make_policy
from wicore_backend.hmt.replay.trace import TraceRequest, read_trace

DEVICE, HOST, NVME = TierName


def request(time: float, *blocks: int, tokens: int | None = None) -> TraceRequest:
    tokens = len(blocks) * 512 if tokens is None else tokens
    return TraceRequest(time, tokens, blocks, tokens // 512)


def run(policy: str, capacity: int, requests: list[TraceRequest], *, device: int = 0, nvme: int = 0, costs=None):
    names = named(requests)
    paths = [chain.first(len(item.blocks)) for item, chain in zip(requests, names, strict=True)]
    tiers = Tiers(device=device, host=capacity, nvme=nvme)
    return replay(requests, names, tiers, lambda _, size: make_policy(policy, size, paths), costs or CostModel())


def conversations(count: int, *, seed: int = 0) -> list[TraceRequest]:
    """Chats that share a first block and grow by two blocks a turn, some of which go on."""
    draw, fresh, requests = random.Random(seed), 1, []
    for number in range(count):
        path, time = [0], number * 3.0
        while True:
            path = [*path, fresh, fresh + 1]
            fresh += 2
            requests.append(request(time, *path))
            if draw.random() < 0.5:
                break
            time += draw.uniform(30, 120)
    return sorted(requests, key=lambda item: item.time)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = (
        {"timestamp": 1000 * item.time, "input_length": item.tokens, "output_length": 1, "hash_ids": list(item.blocks)}
        for item in conversations(60)
    )
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_a_hit_is_the_unbroken_run_from_the_root():
    requests = [request(0, 1, 2, 3), request(1, 1, 2, 9), request(2, 7, 2, 3), request(3, 1, 2, 3)]
    result = run("lru", 100, requests)
    assert result.halves[0].hit_blocks == {HOST: 2}
    assert result.halves[1].hit_blocks == {HOST: 3}
    assert result.hit_rate == 5 / 12


def test_a_path_is_broken_at_its_end():
    result = run("lru", 2, [request(0, 1, 2, 3), request(1, 1, 2, 3)])
    assert result.hit_rate == 2 / 6


def test_hit_tokens_never_exceed_the_prompt():
    result = run("lru", 10, [request(0, 1, 2, tokens=600), request(1, 1, 2, tokens=600)])
    assert result.halves[1].hit_tokens == 600


def test_the_second_half_starts_warm():
    result = run("lru", 10, [request(0, 1, 2), request(1, 1, 2)])
    assert [half.hit_rate for half in result.halves] == [0, 1]


@pytest.mark.parametrize("capacity", [5, 20, 60])
def test_nobody_beats_who_knows_the_future(capacity):
    requests = conversations(150)
    best = run("belady", capacity, requests).hit_rate
    rates = {name: run(name, capacity, requests).hit_rate for name in POLICIES}
    assert max(rates.values()) <= best
    assert min(rates.values()) > 0


def documents(kind: str, count: int) -> list[TraceRequest]:
    """Prompts over documents of five blocks, chosen in the manner of `kind`."""
    draw, requests, scanned = random.Random(7), [], 10**6
    stack: list[int] = []
    for number in range(count):
        if kind == "scan" and draw.random() < 0.7:
            scanned += 8
            requests.append(request(number / 2, *range(scanned, scanned + 8)))
            continue
        if kind == "loop":
            document = number % 150
        elif kind == "shift":
            document = 1000 * (number // 500) + int(draw.paretovariate(1.0)) % 800
        elif kind == "recent":
            old = min(len(stack) - 1, int(draw.expovariate(1 / 30))) if stack and draw.random() < 0.6 else -1
            document = stack.pop(old) if old >= 0 else number
            stack.insert(0, document)
        else:
            document = int(draw.paretovariate(0.8)) % 400
        requests.append(request(number / 2, *range(10 * document, 10 * document + 5)))
    return requests


@pytest.mark.parametrize("kind", ["zipf", "scan", "loop", "shift", "recent"])
@pytest.mark.parametrize("capacity", [100, 400])
def test_a2cr_is_never_much_worse_than_lru(kind, capacity):
    requests = documents(kind, 2_500)
    a2cr, lru = (run(name, capacity, requests) for name in ("a2cr", "lru"))
    assert a2cr.hit_rate > 0.97 * lru.hit_rate - 0.001
    assert a2cr.halves[1].hit_rate > 0.97 * lru.halves[1].hit_rate


@pytest.mark.parametrize("pace", [0.01, 1.0, 100.0])
def test_a2cr_learns_conversations_at_any_pace(pace):
    requests = [TraceRequest(pace * item.time, *astuple(item)[1:]) for item in conversations(1_000)]
    a2cr, lru = (run(name, 100, requests).halves[1].hit_rate for name in ("a2cr", "lru"))
    assert a2cr > 1.1 * lru


def test_an_endless_cache_is_the_same_for_all():
    requests = conversations(80)
    assert len({run(name, 10_000, requests).hit_rate for name in POLICIES}) == 1


def test_host_memory_catches_what_the_device_gives_up():
    result = run("lru", 2, [request(0, 1, 2), request(1, 3, 4), request(2, 1, 2)], device=2)
    assert result.halves[1].hit_blocks == {HOST: 2}
    assert result.stored == {DEVICE: 4, HOST: 4}
    assert result.loaded == {HOST: 2}


def test_what_the_device_kept_need_not_be_loaded():
    result = run("lru", 10, [request(0, 1, 2, 3), request(1, 1, 2, 4)], device=3)
    assert result.halves[1].hit_blocks == {DEVICE: 2}
    assert result.loaded.total() == 0


@pytest.mark.parametrize("name", POLICIES)
def test_a_disk_catches_what_leaves_host_memory(name):
    requests = conversations(200)
    alone, with_disk = (run(name, 20, requests, nvme=nvme) for nvme in (0, 60))
    assert with_disk.hit_rate > alone.hit_rate
    assert with_disk.halves[1].hit_blocks[NVME] > 0
    assert with_disk.loaded[NVME] >= sum(half.hit_blocks[NVME] for half in with_disk.halves)
    assert with_disk.hit_rate <= run("lru", 1000, requests).hit_rate


def test_a_disk_that_is_slower_than_computing_is_left_alone():
    result = run("lru", 20, conversations(200), nvme=100, costs=CostModel(nvme_gigabytes_per_second=1e-6))
    assert result.restores_declined > 0
    assert result.loaded[NVME] == 0


def test_a_prompt_longer_than_host_memory_keeps_its_beginning():
    long = request(0, *range(50))
    for name in ("a2cr", "belady"):
        result = run(name, 10, [long, request(5, *range(50))])
        assert result.halves[1].hit_blocks == {HOST: 10}


def test_time_saved_is_prefill_less_what_blocks_take_to_come_up():
    costs = CostModel(prefill_tokens_per_second=1000, block_bytes=10**9, nvme_gigabytes_per_second=4.0)
    assert costs.seconds_saved(5000, {NVME: 2}) == 5 - 0.5


def test_the_warmest_tier_is_the_device_if_host_memory_is_a_colder_one():
    host, nvme = TierSpec.parse("host=30@55"), TierSpec.parse("nvme=90@3")
    assert Tiers.of(5, []).blocks == {HOST: 5}
    assert Tiers.of(5, [nvme]).blocks == {HOST: 5, NVME: 90}
    assert Tiers.of(5, [nvme, host]).blocks == {DEVICE: 5, HOST: 30, NVME: 90}
    with pytest.raises(InvalidArgumentError, match="once"):
        Tiers.of(5, [host, host])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "not list"),
        ('{"timestamp": "1", "input_length": 1, "hash_ids": [1]}', "timestamp"),
        ('{"timestamp": NaN, "input_length": 1, "hash_ids": [1]}', "timestamp"),
        ('{"timestamp": 1, "input_length": -1, "hash_ids": [1]}', "input_length"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": 1}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": [1, 1]}', "repeats"),
        ('{"timestamp": 1, "input_length": 1, "hash_ids": [true]}', "integers"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(InvalidArgumentError, match=rf"line 2.*{complaint}"):
        read_trace(path)


def test_an_empty_or_missing_trace_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "missing"):
        with pytest.raises(InvalidArgumentError, match=name):
            read_trace(tmp_path / name)


def test_requests_are_put_in_order_of_time(tmp_path):
    path = tmp_path / "trace"
    path.write_text(
        "\n".join(json.dumps({"timestamp": time, "input_length": 600, "hash_ids": [time, 9]}) for time in (5, 2))
    )
    assert [item.time for item in read_trace(path)] == [0.002, 0.005]
    assert read_trace(path)[0].full_blocks == 1


@pytest.mark.parametrize("text", ["host", "host=0@5", "host=5@0", "Host=5@5", "host=5@x", "host=-1@5", "tape=5@5"])
def test_a_bad_tier_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="host=BLOCKS@GBPS"):
        TierSpec.parse(text)


def test_command_line_prints_one_json_object(trace, capsys):
    assert main([str(trace), "--policy", "lru", "belady", "--capacity-blocks", "20", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(run["policy"], run["capacity_blocks"]) for run in report["runs"]] == [
        ("lru", 5),
        ("lru", 20),
        ("belady", 5),
        ("belady", 20),
    ]
    assert 0 < report["runs"][1]["hit_rate"]["whole"] < 1


def test_command_line_with_tiers(trace, capsys):
    arguments = [str(trace), "--policy", "lru", "--capacity-blocks", "5", "--tiers", "host=30@55", "--json"]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert [tier["tier"] for tier in row["tiers"]] == ["device", "host"]
    assert row["tiers"][1]["restored_bytes"] > 0
    assert row["hit_rate"]["whole"] == pytest.approx(sum(tier["hit_rate"] for tier in row["tiers"]))


def test_command_line_table_has_every_policy(trace, capsys):
    assert main([str(trace), "--capacity-blocks", "10"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*POLICIES, "belady"))


def test_command_line_explains_a_missing_trace(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_plot(trace, tmp_path, capsys):
    picture = tmp_path / "hits.png"
    arguments = [str(trace), "--policy", "lru", "--capacity-blocks", "5", "20", "--plot", str(picture)]
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        assert main(arguments) == 2
        assert "wicore[plot]" in capsys.readouterr().err
    else:
        assert main(arguments) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
