"""The engine's speed at a published shape with random weights, on whatever device there is.

What is timed is the engine in this process, end to end: scheduling, block tables, sampling and telling tokens included.
A step's time is the median time from one step of all decodes to the next, as the engine's loop launches them; time to
first token is that of a batch whose prompts all arrive at once, its last one's. A prompt alone is timed several times,
each time another one that finds the engine idle, and the parts of that time are told. What a step's time is made of
comes from PyTorch's profiler, in a run of its own. What clock the card kept meanwhile is told beside (`card_clock.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from scripts.card_clock import CardClock
from scripts.first_token import FirstTokenClock, Parts
from scripts.random_gemma3 import random_weights, write_directory
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.runner import ModelRunner
from wicore_backend.models.gemma3.weights import Weight
from wicore_backend.quantization.fp8 import quantized_fp8
from wicore_backend.quantization.int4_rounding import quantized_int4

_READ_BYTES = 4 * 2**30
_PROMPTS_S, _MOST_PROMPTS = 2.5, 9
"""As many prompts are timed alone as fit in this time, and at most so many."""
_PAUSE_S = 0.02
"""Before each, so that the engine sleeps as it does when nobody asks."""
_PROFILED_STEPS, _NAMED_KERNELS = 16, 12
_KINDS = {
    "matrices": ("_product", "gemm", "nvjet", "cutlass", "gemv", "splitk"),
    "attention": ("decode_kernel", "decode_hopper"),
}
"""Kernels by parts of their names; the rest are norms, RoPE, embedding, sampling, copies."""
QUANTIZE: Mapping[str, Callable[[Tensor], Weight]] = {
    "bf16": lambda matrix: matrix,
    "fp8": quantized_fp8,
    "int4": lambda matrix: quantized_int4(matrix, math.gcd(128, matrix.shape[1]), search=False),
}
"""What is made of a layer's matrix, by `--weights`."""


@dataclass
class _Steps:
    """When each step was launched, and what it was of."""

    decodes: list[int] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    began: list[float] = field(default_factory=list)

    def of(self, batch: int) -> list[tuple[float, float]]:
        """When each step of `batch` decodes alone began, and the next such step."""
        alone = [d == batch and not p for d, p in zip(self.decodes, self.prefilled, strict=True)]
        pairs = zip(self.began, self.began[1:], alone, alone[1:], strict=False)
        return [(before, after) for before, after, this, following in pairs if this and following]


@dataclass(frozen=True, slots=True)
class _Timing:
    """An engine, and what looks at it and at its card."""

    engine: Engine
    steps: _Steps
    first_token: FirstTokenClock
    card: CardClock


def benchmark_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Decode step times and prefill rates of `args.shape`, by batch and by length of context."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"shape": args.shape, "weights": args.weights, "kv": args.kv_dtype}
    if args.weights == "int4":
        results["prefill"] = args.prefill_dtype
    results["head"] = args.weights if args.head else "bf16"
    uuid = None
    if device.type == "cuda":
        results["device"] = torch.cuda.get_device_name(device)
        results["driver"] = _driver()
        results["read_limit_tb_s"] = round(read_limit(device) / 1e12, 3)
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    runs = [(batch, args.prompt) for batch in args.batch] + [(1, length) for length in args.long]
    with (
        tempfile.TemporaryDirectory() as directory,
        _engine(Path(directory), args, runs) as (engine, weight_bytes),
        CardClock(uuid) as card,
    ):
        results["weight_bytes"] = weight_bytes
        timing = _Timing(engine, _record(engine), FirstTokenClock(engine), card)
        results["runs"] = [_run(timing, batch, prompt, args) for batch, prompt in runs]
        for run in results["runs"]:
            run["weights_tb_s"] = round(weight_bytes / run["step_ms"] / 1e9, 3)
        if args.profile and device.type == "cuda":
            layers = len(engine._model.pools.layout.layers)
            results["profiles"] = [_profile(engine, batch, args.prompt, layers) for batch in args.profile]
        results |= device_memory()
    return results


@contextmanager
def random_model(shape: str, weights: str, directory: Path, *, like: Path, head: bool = False) -> Iterator[list[int]]:
    """Engines that are made of `directory` meanwhile have random weights of a shape, in a type of `QUANTIZE`.

    Gives a list that has, once one is made, the bytes of its weights that a decode step reads.
    """
    write_directory(shape, directory, like=like)
    read_bytes: list[int] = []

    def make(_: Path, config: Any, *, device: torch.device, dtype: torch.dtype, **__: Any) -> Any:
        made = random_weights(config, device=device, dtype=dtype, quantize=QUANTIZE[weights], quantize_head=head)
        matrices = [m for layer in made.text.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        read_bytes.append(sum(matrix.nbytes for matrix in (*matrices, made.text.head)))
        if device.type == "cuda":  # What making them took is none of a server's.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return made

    with mock.patch("wicore_backend.engine.executor_loading.load_weights", make):
        yield read_bytes


def device_memory() -> dict[str, float]:
    """GB that PyTorch's allocator had given out, and taken, at most; and what all together take of the device now."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    taken = {
        "peak_memory_gb": torch.cuda.max_memory_allocated(),
        "peak_reserved_gb": torch.cuda.max_memory_reserved(),
        "device_used_gb": total - free,
    }
    return {name: round(count / 1e9, 2) for name, count in taken.items()}


@contextmanager
def _engine(directory: Path, args: argparse.Namespace, runs: list[tuple[int, int]]) -> Iterator[tuple[Engine, int]]:
    """An engine of the shape, and the bytes of its weights that a decode step reads."""
    longest = max(prompt for _, prompt in runs) + args.new
    settings = EngineConfig(
        model=directory,
        max_model_len=None if longest > args.context else args.context,
        max_running=max(batch for batch, _ in runs),
        max_batch_tokens=args.batch_tokens,
        max_decode_slowdown=1000.0,  # Prompts first: decode steps are then of the whole batch.
        prefix_cache=False,
        max_guessed_tokens=0,  # Random weights fall into loops, which are guessed: steps would be of several tokens.
        host_cache_bytes=args.host_bytes,
        kv_cache_bytes=args.kv_bytes,
        kv_cache_dtype=args.kv_dtype,
        int4_prefill_dtype=args.prefill_dtype,
    )
    with (
        random_model(args.shape, args.weights, directory, like=args.model, head=args.head) as weight_bytes,
        Engine(settings) as engine,
    ):
        yield engine, weight_bytes[0]


def _record(engine: Engine) -> _Steps:
    """Have the engine's steps noted from now on."""
    steps = _Steps()
    runner = engine._model.runner
    run = runner.run

    def noted(plan: Any, *args: Any) -> Any:
        steps.decodes.append(len(plan.decodes))
        steps.prefilled.append(sum(c.end - c.start for c in plan.chunks))
        steps.began.append(time.perf_counter())
        return run(plan, *args)

    assert isinstance(runner, ModelRunner)
    mock.patch.object(runner, "run", noted).start()
    return steps


def _run(timing: _Timing, batch: int, prompt: int, args: argparse.Namespace) -> dict[str, Any]:
    """One warm-up and `args.rounds` rounds of `batch` prompts of `prompt` tokens; of one alone more prompts."""
    steps, clock = timing.steps, timing.first_token
    first_token: list[float] = []
    parts: list[Parts] = []
    step = []
    prompts_at: list[tuple[float, float]] = []
    steps_at: list[tuple[float, float]] = []

    def timed(round_: int, length: int, new: int) -> None:
        time.sleep(_PAUSE_S)
        ttft = _round(timing.engine, batch, length, new, seed=round_, temperature=args.temperature, ask=clock.ask)
        if round_:
            first_token.append(ttft)
            parts.append(clock.parts(ttft))
            prompts_at.append((clock.asked, clock.asked + ttft))

    for round_ in range(args.rounds + 1):
        for noted in (steps.decodes, steps.prefilled, steps.began):
            noted.clear()
        timed(round_, prompt if round_ else min(prompt, args.warm_up), args.new)
        if round_:
            if not (of_all := steps.of(batch)):
                raise SystemExit(
                    f"of {batch} answers at most {max(steps.decodes)} were decoded at once: give --kv-bytes more, or "
                    "--batch-tokens less, which the KV cache keeps room for"
                )
            step.append(statistics.median(after - before for before, after in of_all))
            steps_at += of_all
    if batch == 1:
        # Of two tokens, for with the first of more than one the device is given the step after it.
        for round_ in range(args.rounds + 1, 1 + (args.prompts or _prompts(first_token[0]))):
            timed(round_, prompt, 2)
    ttft, step_s = statistics.median(first_token), statistics.median(step)
    result = {
        "batch": batch,
        "prompt": prompt,
        "temperature": args.temperature,
        "step_ms": round(step_s * 1e3, 3),
        "decode_tokens_per_s": round(batch / step_s, 1),
        "ttft_s": round(ttft, 4),
        "prefill_tokens_per_s": round(batch * prompt / ttft),
        "step_ms_of_rounds": [round(s * 1e3, 3) for s in step],
        "ttft_s_of_rounds": [round(s, 4) for s in first_token],
    }
    if batch == 1:
        result["ttft_parts_ms"] = Parts.medians_ms(parts)
    if (of_prompts := timing.card.between(*prompts_at)) is not None:
        result["card"] = {"prompts": of_prompts, "steps": timing.card.between(*steps_at)}
    print(json.dumps(result), file=sys.stderr, flush=True)  # So that a long run cut short was not for nothing.
    return result


def _prompts(ttft_s: float) -> int:
    """How many prompts to time alone, if one takes so long."""
    return max(1, min(_MOST_PROMPTS, int(_PROMPTS_S / ttft_s)))


def _round(
    engine: Engine,
    batch: int,
    prompt: int,
    new: int,
    *,
    seed: int,
    temperature: float = 0.0,
    ask: Callable[[], None] = lambda: None,
) -> float:
    """Seconds until the last of `batch` answers has its first token; all answers are awaited.

    `ask` is called when the prompts are there, before the first is asked.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(300, 2000, prompt).tolist() for _ in range(batch)]
    params = SamplingParams(max_tokens=new, temperature=temperature, ignore_eos=True)
    ask()
    streams = [engine.stream(tokens, params) for tokens in prompts]
    results = [stream.collect() for stream in streams]
    assert all(len(result.token_ids) == new for result in results)
    return max(result.usage.ttft_s or 0.0 for result in results)


def _profile(engine: Engine, batch: int, prompt: int, layers: int) -> dict[str, Any]:
    """Microseconds of a decode step of `batch` after prompts of `prompt` tokens, by kind of kernel.

    A kernel may start before the one that it follows has ended. What counts as its time is what it adds: from when the
    last one before it ended, or itself began, to its end. In what is idle no kernel ran.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _round(engine, batch, prompt, 2 * _PROFILED_STEPS, seed=100)
        torch.cuda.synchronize()
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    )
    attended = [start for start, _, name in kernels if any(part in name for part in _KINDS["attention"])]
    first, last = attended[-_PROFILED_STEPS * layers - 1], attended[-1]
    times = dict.fromkeys([*_KINDS, "rest", "idle"], 0.0)
    by_name: Counter[str] = Counter()
    done = first
    for start, end, name in kernels:
        if first <= start < last:
            kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "rest")
            times["idle"] += max(0.0, start - done)
            times[kind] += max(0.0, end - max(start, done))
            by_name[name[:48]] += max(0.0, end - max(start, done))
            done = max(done, end)
    parts = {f"{kind}_us": round(time / _PROFILED_STEPS) for kind, time in times.items()}
    longest = {name: round(time / _PROFILED_STEPS) for name, time in by_name.most_common(_NAMED_KERNELS)}
    return {"batch": batch, "step_us": round((last - first) / _PROFILED_STEPS), **parts, "longest_us": longest}


def _driver() -> str:
    """The driver's version, as the system tells it; "unknown" where it does not."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("  ")
    except OSError:
        return "unknown"
    return next((word.strip() for word in words if word.strip()[:1].isdigit()), "unknown")


def read_limit(device: torch.device) -> float:
    """Bytes a second at which the device reads its memory: sums of parts of 4 GiB, the best of several."""
    from wicore_backend.executor.kernels.reading import read_all

    memory = torch.empty(_READ_BYTES // 4, dtype=torch.int32, device=device).random_()
    best = 0.0
    for _ in range(8):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        read_all(memory)
        ended.record()
        ended.synchronize()
        best = max(best, _READ_BYTES / began.elapsed_time(ended) * 1e3)
    return best
