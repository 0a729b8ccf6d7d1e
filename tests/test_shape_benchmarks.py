"""The benchmarks at published shapes run from end to end, at a shape that any machine computes."""

import json
import statistics
import sys
from typing import Any

import pytest

from scripts import benchmark, benchmark_restore, benchmark_shape


def figures(capsys, monkeypatch, main, *args: str) -> dict:
    """What a benchmark prints last."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    main()
    printed: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return printed


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_decode_steps_and_prompts_are_timed(capsys, monkeypatch, weights):
    size = ["--batch", "1", "3", "--prompt", "40", "--new", "24", "--rounds", "1", "--context", "256", "--json"]
    size += ["--batch-tokens", "256", "--kv-bytes", "100000000"]
    found = figures(capsys, monkeypatch, benchmark.main, "engine", "--shape", "tiny", "--weights", weights, *size)
    runs = found["result"]["runs"]
    assert [run["batch"] for run in runs] == [1, 3]
    assert all(run["step_ms"] > 0 and run["prefill_tokens_per_s"] > 0 for run in runs)


def test_a_prompt_alone_is_timed_several_times_and_its_parts_are_all_of_its_time(capsys, monkeypatch):
    def runs(prompts: int) -> Any:
        size = ["--batch", "1", "2", "--prompt", "40", "--new", "16", "--rounds", "1", "--context", "256", "--json"]
        size += ["--batch-tokens", "256", "--kv-bytes", "100000000", "--prompts", str(prompts)]
        return figures(capsys, monkeypatch, benchmark.main, "engine", "--shape", "tiny", *size)["result"]["runs"]

    alone, together = runs(4)
    assert (len(alone["ttft_s_of_rounds"]), len(together["ttft_s_of_rounds"])) == (4, 1)
    assert alone["ttft_s"] == pytest.approx(statistics.median(alone["ttft_s_of_rounds"]), abs=1e-4)
    assert alone["prefill_tokens_per_s"] == pytest.approx(40 / alone["ttft_s"], rel=0.02)
    assert "ttft_parts_ms" not in together
    once = runs(1)[0]
    parts, ttft_s = once["ttft_parts_ms"], once["ttft_s"]
    whole_ms = parts["to_device"] + parts["on_device"] + parts["to_caller"]
    assert whole_ms == pytest.approx(ttft_s * 1e3, abs=0.06)
    assert min(parts["to_device"], parts["on_device"], parts["launching"]) > 0


@pytest.mark.parametrize(("ttft_s", "prompts"), [(0.038, 9), (0.65, 3), (12.8, 1)])
def test_short_prompts_are_timed_more_often_than_long_ones(ttft_s, prompts):
    assert benchmark_shape._prompts(ttft_s) == prompts


def test_each_prompt_comes_back_from_host_memory_and_from_a_disk(capsys, monkeypatch, tmp_path):
    memory = ["--kv-bytes", "40000000", "--host-bytes", "80000000", "--disk", str(tmp_path)]
    memory += ["--disk-bytes", "200000000"]
    size = ["--shape", "tiny", "--lengths", "600", "1500", "--new", "9", "--rounds", "1", "--batch-tokens", "256"]
    rows = figures(capsys, monkeypatch, benchmark_restore.main, *size, *memory)["rows"]
    for length, row in zip([600, 1500], rows, strict=True):
        assert row["length"] == length
        assert row["host_cached"] == (length - 1) // 32 * 32
        assert row["disk_cached"] in (0, row["host_cached"])  # A busy disk may be slower than computing is.
        assert row["disk_alone_gb_s"] > 0
        (round_,) = row["host_rounds"]
        assert 0 < round_["asked_s"] <= round_["up_end_s"] <= round_["ttft_s"]
        assert round_["up_gb"] == pytest.approx(row["prefix_bytes"] / 1e9, abs=0.001)
        assert round_["from_disk_gb"] == 0
