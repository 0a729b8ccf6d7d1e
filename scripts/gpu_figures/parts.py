"""The parts of the report, and the commands of each: on a card, and where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.gpu_figures.running import Run

_TINY = ("--shape", "tiny", "--rounds", "1", "--json", "--batch-tokens", "256", "--kv-bytes", "100000000")
_SHAPE = ("--shape", "gemma-3-27b", "--rounds", "1", "--json")


def _words(command: str) -> list[str]:
    return command.split()


def _told_runs(objects: list[Any]) -> Any:
    """Of `benchmark engine`, which tells each run as soon as it is over."""
    runs = [told for told in objects if "step_ms" in told]
    return {"result": {"runs": runs}} if runs else None


def _told_rows(objects: list[Any]) -> Any:
    """Of `benchmark_restore`, which tells a row each time that it has grown."""
    rows = {told["length"]: told for told in objects if "length" in told}
    return {"rows": list(rows.values())} if rows else None


def _told_rounds(objects: list[Any]) -> Any:
    """Of `benchmark serving`, which tells the figures so far after each round."""
    rounds = [told for told in objects if "served_over_in_process" in told]
    return {"result": rounds[-1]} if rounds else None


def _engine(name: str, arguments: str, *, limit_s: float, expected_s: float, tiny: str = "") -> Run:
    tiny = tiny or "--batch 1 3 --prompt 40 --new 16 --context 256"
    return Run(
        name,
        ["scripts.benchmark", "engine", *_SHAPE, *arguments.split()],
        ["scripts.benchmark", "engine", *_TINY, *tiny.split()],
        limit_s=limit_s,
        expected_s=expected_s,
        lines=_told_runs,
    )


_BATCHES = "--batch 1 16 64 128 --long 8192 --new 40 --kv-bytes 78000000000 --context 8320"
_AT_128K = "--batch 1 --prompt 130000 --new 48 --kv-bytes 16000000000 --warm-up 15312"
"""The warm-up has a step of as many tokens as the last one of 130,000 in steps of 8,192."""
_AT_128K_TINY = "--batch 1 --prompt 600 --new 16 --warm-up 64 --context 1024"

PARTS: Mapping[str, tuple[Run, ...]] = {
    "bf16": (_engine("bf16", f"--weights bf16 {_BATCHES}", limit_s=75, expected_s=38),),
    "fp8": (
        _engine(
            "fp8",
            f"--weights fp8 {_BATCHES}",
            limit_s=70,
            expected_s=32,
            tiny="--weights fp8 --batch 1 3 --prompt 40 --new 16 --context 256",
        ),
    ),
    "int4": (
        _engine(
            "int4",
            "--weights int4 --batch 1 16 64 --new 64 --kv-bytes 40000000000 --context 8192",
            limit_s=70,
            expected_s=28,
            tiny="--weights int4 --batch 1 3 --prompt 40 --new 16 --context 256",
        ),
    ),
    "long": (
        _engine("long", f"--weights bf16 {_AT_128K}", limit_s=75, expected_s=36, tiny=_AT_128K_TINY),
        _engine(
            "long-fp8-kv",
            f"--weights bf16 --kv-dtype fp8 {_AT_128K}",
            limit_s=75,
            expected_s=36,
            tiny=f"--kv-dtype fp8 {_AT_128K_TINY}",
        ),
    ),
    "memory": (
        _engine(
            "memory",
            "--weights int4 --kv-dtype fp8 --batch 1 --prompt 130000 --new 32 --batch-tokens 512 --context 131072 "
            "--warm-up 2048 --kv-bytes 5730000000",
            limit_s=80,
            expected_s=40,
            tiny=f"--weights int4 --kv-dtype fp8 {_AT_128K_TINY}",
        ),
    ),
    "restore": (
        Run(
            "restore",
            _words(
                "scripts.benchmark_restore --weights bf16 --lengths 32768 130000 --new 9 --rounds 2 "
                "--kv-bytes 15500000000 --host-bytes 15000000000 --disk {scratch} --disk-bytes 24000000000"
            ),
            _words(
                "scripts.benchmark_restore --shape tiny --lengths 600 1500 --new 9 --rounds 1 --batch-tokens 256 "
                "--kv-bytes 40000000 --host-bytes 80000000 --disk {scratch} --disk-bytes 200000000"
            ),
            limit_s=140,
            expected_s=85,
            lines=_told_rows,
        ),
    ),
    "loading": (
        Run(
            "loading",
            _words("scripts.benchmark_loading --shape gemma-3-27b --directory {scratch} --rounds 1"),
            _words("scripts.benchmark_loading --shape tiny --directory {scratch} --rounds 1 --device meta"),
            limit_s=130,
            expected_s=100,
        ),
    ),
    "grpc": (
        Run(
            "grpc",
            _words(
                "scripts.benchmark serving --device cuda --shape gemma-3-27b --weights int4 --directory {scratch} "
                "--streams 64 --new 512 --rounds 2 --client-processes 4 --context 4096 --batch-tokens 2048 "
                "--kv-bytes 34000000000 --json"
            ),
            _words(
                "scripts.benchmark serving --emulated-step-ms 15 --shape tiny --directory {scratch} --streams 4 "
                "--new 16 --rounds 1 --json"
            ),
            limit_s=160,
            expected_s=110,
            lines=_told_rounds,
        ),
    ),
    "vision": (
        Run(
            "vision",
            _words("scripts.benchmark_vision --json"),
            _words("scripts.benchmark_vision --device cpu --small --rounds 1 --json"),
            limit_s=40,
            expected_s=14,
        ),
    ),
    "speculation": (
        Run(
            "speculation",
            _words("scripts.benchmark_speculation --device cuda --streams 1 16 --rounds 2"),
            _words("scripts.benchmark_speculation --threads 1 --streams 1 --rounds 1 --new 12"),
            limit_s=60,
            expected_s=35,
            rows=True,
        ),
    ),
    "cold-tier": (
        Run(
            "cold-tier",
            _words("scripts.benchmark_cold_tier --directory {scratch} --tokens 131072 --kv-dtype fp8 --rounds 2"),
            _words("scripts.benchmark_cold_tier --directory {scratch} --tokens 256 --rounds 1"),
            limit_s=80,
            expected_s=45,
        ),
    ),
    "tests": (
        Run(
            "tests",
            _words("scripts.gpu_figures.tests --processes 8"),
            _words("scripts.gpu_figures.tests --collect"),
            limit_s=400,
            expected_s=240,
        ),
    ),
}
"""By name, in the order of their worth."""
