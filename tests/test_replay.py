"""Replay of block traces: reading, hits, tiers, the reference, the command line."""

import json
import random
from dataclasses import astuple
from pathlib import Path

import pytest

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.replay.__main__ import main
from wicore_backend.hmt.replay.furthest_next_use import FurthestNextUse
from wicore_backend.hmt.replay.simulator import Tier, replay
from wicore_backend.hmt.replay.tiers import CostModel, TierSpec
from wicore_backend.hmt.replay.trace import TraceRequest, read_trace


def request(time: float, *blocks: int, tokens: int | None = None) -> TraceRequest:
    tokens = len(blocks) * 512 if tokens is None else tokens
    return TraceRequest(time, tokens, blocks, tokens // 512)


def run(policy: str, capacity: int, requests: list[TraceRequest]):
    return replay(requests, [Tier("device", POLICIES[policy](capacity))])


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
    assert result.halves[0].hit_blocks == [2]
    assert result.halves[1].hit_blocks == [3]
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
    best = replay(requests, [Tier("device", FurthestNextUse(capacity, requests))]).hit_rate
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


def test_a_colder_tier_catches_what_the_warm_one_gives_up():
    requests = [request(0, 1, 2), request(1, 3, 4), request(2, 1, 2)]
    tiers = [Tier("device", POLICIES["lru"](2)), Tier("host", POLICIES["lru"](2))]
    result = replay(requests, tiers)
    assert result.halves[1].hit_blocks == [0, 2]
    assert result.restored == [0, 2]
    assert result.stored == [4, 4]


@pytest.mark.parametrize("name", POLICIES)
def test_two_lru_tiers_or_one_of_their_size_keep_the_books(name):
    requests = conversations(200)
    two = replay(requests, [Tier("device", POLICIES[name](20)), Tier("host", POLICIES[name](60))])
    one = run("lru", 80, requests)
    assert 0 < two.hit_rate <= replay(requests, [Tier("device", FurthestNextUse(1000, requests))]).hit_rate
    if name == "lru":
        assert two.hit_rate == one.hit_rate


def test_time_saved_is_prefill_less_restores():
    costs = CostModel(prefill_tokens_per_second=1000, block_bytes=10**9)
    assert costs.seconds_saved(5000, [2], [TierSpec("host", 10, 4.0)]) == 5 - 0.5


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


@pytest.mark.parametrize("text", ["host", "host=0@5", "host=5@0", "Host=5@5", "host=5@x", "host=-1@5"])
def test_a_bad_tier_is_refused(text):
    with pytest.raises(InvalidArgumentError, match="NAME=BLOCKS@GBPS"):
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
