"""Measures what users feel of the scheduler, with the demo model in this process, and prints one JSON object.

    python -m scripts.benchmark_latency mixed    chats alone, then the same chats beside prompts of 8K tokens
    python -m scripts.benchmark_latency prefix   the first and the second turn of a conversation of 4K tokens
    python -m scripts.benchmark_latency restore  a prompt of 8K tokens, computed, and found on disk after a restart

Figures that are compared come from one run, taken in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from scripts.benchmark import DEMO_MODEL, environment
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.request import FinishedEvent, Usage
from wicore_backend.engine.results import EventStream

_VOCABULARY = range(300, 2048)
"""Tokens of the demo model that are text."""


class Bench:
    """An engine and a supply of prompts of which no two begin alike."""

    def __init__(self, args: argparse.Namespace, **settings: Any) -> None:
        self.engine = Engine(
            EngineConfig(
                model=args.model,
                device="cpu",
                dtype="float32",
                threads=args.threads,
                kv_cache_bytes=2 * 2**30,
                **settings,
            )
        )
        self._rng = np.random.default_rng(0)

    def prompt(self, tokens: int) -> list[int]:
        return [2, *self._rng.choice(_VOCABULARY, tokens - 1).tolist()]

    def start(self, prompt: list[int], new_tokens: int) -> EventStream:
        return self.engine.stream(prompt, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))

    def answer(self, prompt: list[int], new_tokens: int) -> tuple[list[int], Usage]:
        """The answer's tokens and what it took."""
        result = self.start(prompt, new_tokens).collect()
        return result.token_ids, result.usage


def chat(bench: Bench, args: argparse.Namespace) -> list[float]:
    """Seconds per output token of each chat, `--chats` of them talking at once."""
    tpots: list[float] = []

    def talk() -> None:
        for _ in range(args.turns):
            _, usage = bench.answer(bench.prompt(100), args.new_tokens)
            assert usage.tpot_s is not None
            tpots.append(usage.tpot_s)

    people = [threading.Thread(target=talk) for _ in range(args.chats)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    return tpots


@contextmanager
def long_prompts(bench: Bench, tokens: int) -> Iterator[list[float]]:
    """One long prompt after the other, for as long as the block runs; gives their times to the first token."""
    stop, ttfts = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            with bench.start(bench.prompt(tokens), 4) as stream:
                for event in stream:
                    if stop.is_set():
                        break
                    if isinstance(event, FinishedEvent) and event.usage.ttft_s is not None:
                        ttfts.append(event.usage.ttft_s)

    person = threading.Thread(target=ask)
    person.start()
    yield ttfts
    stop.set()
    person.join()


def mixed(args: argparse.Namespace) -> dict[str, Any]:
    """Do short chats keep their pace beside long prompts?"""
    bench = Bench(args)
    with long_prompts(bench, args.tokens or 8192):  # Warms up, and lets the engine learn how long its steps take.
        chat(bench, args)
    alone: list[float] = []
    beside: list[float] = []
    ttfts: list[float] = []
    for _ in range(args.rounds):
        alone += chat(bench, args)
        with long_prompts(bench, args.tokens or 8192) as measured:
            time.sleep(0.5)
            beside += chat(bench, args)
        ttfts += measured
    p99 = {name: float(np.percentile(values, 99)) for name, values in (("alone", alone), ("beside", beside))}
    step = bench.engine.statistics().step
    bench.engine.close()
    return {
        "chats": len(alone),
        "alone_tpot_ms": {"p50": round(statistics.median(alone) * 1e3, 2), "p99": round(p99["alone"] * 1e3, 2)},
        "beside_tpot_ms": {"p50": round(statistics.median(beside) * 1e3, 2), "p99": round(p99["beside"] * 1e3, 2)},
        "p99_over_p50_alone": round(p99["beside"] / statistics.median(alone), 2),
        "p99_over_p99_alone": round(p99["beside"] / p99["alone"], 2),
        "long_prompts": len(ttfts),
        "long_ttft_s_p50": round(statistics.median(ttfts), 2) if ttfts else None,
        "step_time_error": None if step is None else round(step.error, 3),
    }


def prefix(args: argparse.Namespace) -> dict[str, Any]:
    """How much sooner does a second turn begin?"""
    bench = Bench(args)
    bench.answer(bench.prompt(600), 4)
    first, second = [], []
    for _ in range(args.rounds):
        prompt = bench.prompt(args.tokens or 4096)
        tokens, usage = bench.answer(prompt, args.new_tokens)
        first.append(usage.ttft_s or 0.0)
        _, usage = bench.answer([*prompt, *tokens, *bench.prompt(40)[1:]], args.new_tokens)
        second.append(usage.ttft_s or 0.0)
        assert usage.cached_tokens >= len(prompt) + args.new_tokens - 1 - bench.engine.config.block_size
    bench.engine.close()
    return {
        "first_ttft_ms": round(statistics.median(first) * 1e3, 1),
        "second_ttft_ms": round(statistics.median(second) * 1e3, 1),
        "times_sooner": round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 1),
    }


def restore(args: argparse.Namespace) -> dict[str, Any]:
    """How much sooner does an answer begin if another engine has left the prompt on disk?"""
    figures: dict[str, Any] = {}
    for codec in ("exact", "q8"):
        computed, restored, same = [], [], []
        with TemporaryDirectory(dir=args.directory) as directory:
            disk = {"nvme_cache_path": directory, "nvme_cache_bytes": 2 * 2**30, "nvme_codec": codec}
            first = Bench(args, **disk)
            prompts = [first.prompt(args.tokens or 8192) for _ in range(args.rounds)]
            first.answer(first.prompt(600), 4)
            answers = []
            for prompt in prompts:
                tokens, usage = first.answer(prompt, args.new_tokens)
                answers.append(tokens)
                computed.append(usage.ttft_s or 0.0)
            first.engine.close()
            second = Bench(args, **disk)
            second.answer([2, 300, 301], 4)
            for prompt, answer in zip(prompts, answers, strict=True):
                tokens, usage = second.answer(prompt, args.new_tokens)
                assert usage.cached_tokens >= len(prompt) - 1 - second.engine.config.block_size
                restored.append(usage.ttft_s or 0.0)
                same.append(tokens == answer)
            second.engine.close()
        figures[codec] = {
            "computed_ttft_ms": round(statistics.median(computed) * 1e3, 1),
            "restored_ttft_ms": round(statistics.median(restored) * 1e3, 1),
            "times_sooner": round(statistics.median(computed) / statistics.median(restored), 1),
            "same_answers": f"{sum(same)} of {len(same)}",
        }
    return figures


_BENCHMARKS = {"mixed": mixed, "prefix": prefix, "restore": restore}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(_BENCHMARKS))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--threads", type=int, help="CPU threads of one operator (default: PyTorch's choice)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=4, help="that talk at once")
    parser.add_argument("--turns", type=int, default=8, help="of each chat in a round")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--tokens", type=int, help="of each long prompt (default: 8192, and 4096 for prefix)")
    parser.add_argument("--directory", type=Path, help="on the disk for restore (default: for temporary files)")
    args = parser.parse_args()
    figures = _BENCHMARKS[args.what](args)
    print(json.dumps({"benchmark": args.what, **figures, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
