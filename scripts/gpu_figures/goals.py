"""The goals on one H200 with Gemma-3-27B, and where each figure stands in what the parts gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scripts.gpu_figures.running import Report

Read = Callable[[Any], float | None]
"""Takes a run's result; None if the figure is not in it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to be reached.

    Attributes
    ----------
    run
        Of which it is.
    limit
        What it has to be at most, or at least if `more`; None for a figure that is told and not judged.
    """

    what: str
    run: str
    read: Read
    unit: str
    limit: float | None = None
    more: bool = False

    def figure(self, reports: Mapping[str, Report]) -> float | None:
        """What was measured; None if it was not, or not to this point."""
        report = reports.get(self.run)
        if report is None or report.result is None:
            return None
        try:
            return self.read(report.result)
        except (KeyError, IndexError, TypeError, StopIteration, ValueError):
            return None

    def met(self, figure: float | None) -> bool | None:
        """None for what was not measured or is not judged."""
        if figure is None or self.limit is None:
            return None
        return figure >= self.limit if self.more else figure <= self.limit

    @property
    def wanted(self) -> str:
        if self.limit is None:
            return ""
        return f"{'at least' if self.more else 'at most'} {self.limit:,g}"


def _of_run(batch: int, prompt: int, key: str, scale: float = 1.0) -> Read:
    def read(result: Any) -> float:
        runs = result["result"]["runs"]
        return float(scale * next(run[key] for run in runs if (run["batch"], run["prompt"]) == (batch, prompt)))

    return read


def _of(key: str) -> Read:
    return lambda result: float(result["result"][key])


def _longest(key: str) -> Read:
    """Of the longest prompt that was restored."""
    return lambda result: float(result["rows"][-1][key])


def _cold(result: Any) -> float:
    return float(result["shares"]["tier_up"])


def _speed_up(answers: str) -> Read:
    """The least of the numbers of streams."""
    return lambda rows: min(float(row["speed_up"]) for row in rows if row["answers"] == answers)


def _steps(weights: str, name: str, limits: Mapping[int, float]) -> list[Goal]:
    return [
        Goal(f"{name} batch {batch}, ms a step", weights, _of_run(batch, 512, "step_ms"), "ms", limit)
        for batch, limit in limits.items()
    ]


GOALS: tuple[Goal, ...] = (
    *_steps("bf16", "bf16", {1: 13.2, 16: 15.2, 64: 19.8, 128: 26.5}),
    *_steps("fp8", "fp8", {1: 7.6, 16: 9.5, 64: 14.5, 128: 22.5}),
    *_steps("int4", "int4", {1: 5.2, 16: 8.0, 64: 15.0}),
    Goal("bf16 prefill at 8K", "bf16", _of_run(1, 8192, "prefill_tokens_per_s"), "tokens/s", 12_500, more=True),
    Goal("fp8 prefill at 8K", "fp8", _of_run(1, 8192, "prefill_tokens_per_s"), "tokens/s", 20_000, more=True),
    Goal("TTFT of 512 tokens, bf16", "bf16", _of_run(1, 512, "ttft_s", 1e3), "ms", 39),
    Goal("TTFT of 512 tokens, fp8", "fp8", _of_run(1, 512, "ttft_s", 1e3), "ms", 28),
    Goal("TTFT of 512 tokens, int4", "int4", _of_run(1, 512, "ttft_s", 1e3), "ms"),
    Goal("decode after 130,000 tokens, bf16", "long", _of_run(1, 130_000, "step_ms"), "ms", 15.5),
    Goal("the same, keys and values in FP8", "long-fp8-kv", _of_run(1, 130_000, "step_ms"), "ms"),
    Goal("TTFT of 130,000 tokens, bf16", "long", _of_run(1, 130_000, "ttft_s"), "s", 12.5),
    Goal("the same, keys and values in FP8", "long-fp8-kv", _of_run(1, 130_000, "ttft_s"), "s"),
    Goal("TTFT restored from host memory", "restore", _longest("host_ttft_s"), "s", 0.35),
    Goal("restored from NVMe, share of the disk's speed", "restore", _longest("disk_share"), "", 0.85, more=True),
    Goal("TTFT restored from NVMe", "restore", _longest("disk_ttft_s"), "s"),
    Goal("NVMe tier without a model, share", "cold-tier", _cold, "", 0.85, more=True),
    Goal("int4 + 130,000 tokens of FP8 KV, peak memory", "memory", _of("peak_memory_gb"), "GB", 24),
    Goal("gRPC at 64 streams over in process", "grpc", _of("served_over_in_process"), "", 0.95, more=True),
    Goal("gRPC at 64 streams", "grpc", _of("served_tokens_per_s"), "tokens/s"),
    Goal("loading, share of the disk's own speed", "loading", _of("share"), "", 0.9, more=True),
    Goal("loading", "loading", _of("cold_gb_s"), "GB/s"),
    Goal("vision, one picture as a graph", "vision", lambda r: float(r["rows"][0]["graph_device_ms"]), "ms"),
    Goal("guessed tokens, a text said after: times as fast", "speculation", _speed_up("said after"), ""),
    Goal("guessed tokens, nothing repeats: times as fast", "speculation", _speed_up("nothing repeats"), ""),
    Goal("tests on the card that fail", "tests", lambda r: float(len(r["failed"])), "", 0),
    Goal(
        "answers that are those of a CPU, bf16",
        "tests",
        lambda r: float(r["same_answers"]["bfloat16"]),
        "",
        0.99,
        more=True,
    ),
)
"""In the order in which they are told."""
