"""The benchmarks at published shapes run from end to end, at a shape that any machine computes."""

import json
import sys

import pytest

from scripts import benchmark, benchmark_restore


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
