"""Measures Wicore and prints one JSON object.

    python -m scripts.benchmark engine    the engine in this process against transformers' generate, same weights;
                                          with --shape, its speed at a published shape with random weights
    python -m scripts.benchmark serving   the same load in this process and through a real server's gRPC ensemble
    python -m scripts.benchmark scheduler what planning takes of a step; no model

Figures that are compared come from one run, taken in turns, and are medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmark_serving import benchmark_serving, in_turns, run_in_process
from scripts.benchmark_shape import benchmark_shape
from scripts.emulated_device import add_emulated_device
from scripts.random_gemma3 import SHAPES
from scripts.scheduling_cost import benchmark_scheduler
from wicore_backend import Engine, EngineConfig

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts as token ids, and how many tokens to generate after each."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @classmethod
    def mixed(cls, count: int, vocab: int, seed: int = 0) -> Load:
        """`count` requests of 16 to 256 prompt tokens and 16 to 128 new ones, the same for a seed."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(300, vocab, rng.integers(16, 257)).tolist() for _ in range(count)]
        return cls(prompts, rng.integers(16, 129, count).tolist())

    @property
    def tokens(self) -> int:
        return sum(self.new_tokens)


class Wicore:
    """The engine, as one side of a comparison."""

    def __init__(self, model: Path, threads: int | None) -> None:
        self._engine = Engine(EngineConfig(model=model, device="cpu", dtype="float32", threads=threads))

    def run(self, load: Load) -> None:
        """All of the load at once."""
        run_in_process(self._engine, load.prompts, load.new_tokens)


class Transformers:
    """transformers' generate, as the other."""

    def __init__(self, model: Path, threads: int | None) -> None:
        from transformers import AutoModelForImageTextToText

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()

    def run(self, load: Load) -> None:
        """All of the load in one batch, padded on the left, until the longest answer is there."""
        width = max(map(len, load.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in load.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in load.prompts])
        longest = max(load.new_tokens)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


class Worker:
    """A side in a process of its own: two libraries' thread pools in one process slow each other down."""

    def __init__(self, side: type[Wicore | Transformers], args: argparse.Namespace) -> None:
        self._executor = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_start_side, initargs=(side, args.model, args.threads)
        )

    def run(self, load: Load) -> None:
        self._executor.submit(_run_side, load).result()

    def close(self) -> None:
        self._executor.shutdown()


_side: Wicore | Transformers
"""What a worker's process runs."""


def _start_side(side: type[Wicore | Transformers], model: Path, threads: int | None) -> None:
    global _side
    _side = side(model, threads)


def _run_side(load: Load) -> None:
    _side.run(load)


def benchmark_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second at batch 1 and at 16 requests of mixed lengths, against transformers."""
    vocab = json.loads((args.model / "config.json").read_text())["text_config"]["vocab_size"]
    loads = {
        "batch 1": Load(Load.mixed(1, vocab).prompts, [128]),
        "16 requests of mixed lengths": Load.mixed(16, vocab),
    }
    workers = {"wicore": Worker(Wicore, args), "transformers": Worker(Transformers, args)}
    results: dict[str, Any] = {}
    for name, load in loads.items():
        times = in_turns({side: partial(worker.run, load) for side, worker in workers.items()}, args.rounds)
        ratios = [t / w for t, w in zip(times["transformers"], times["wicore"], strict=True)]
        results[name] = {
            "new_tokens": load.tokens,
            **{f"{s}_tokens_per_s": round(load.tokens / statistics.median(t), 1) for s, t in times.items()},
            "wicore_over_transformers": round(statistics.median(ratios), 2),
        }
    for worker in workers.values():
        worker.close()
    return results


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join([f"python -m scripts.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engine", "serving", "scheduler"])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of engine and serving")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads of one operator")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="tokens of each stream")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--client-processes", type=int, default=1, help="that the streams are shared out among")
    serving.add_argument("--directory", type=Path, help="for the random weights of --shape, which are written first")
    add_emulated_device(serving)
    parser.add_argument("--running", type=int, default=256, help="sequences that run, for the scheduler")
    parser.add_argument("--waiting", type=int, default=1000, help="and that wait")
    parser.add_argument("--steps", type=int, default=1000, help="of a round")
    shape = parser.add_argument_group("engine --shape, serving --shape")
    shape.add_argument("--shape", choices=SHAPES, help="of a published model; its weights are random")
    shape.add_argument("--weights", choices=["bf16", "fp8", "int4"], default="bf16")
    shape.add_argument("--head", action="store_true", help="in the type of --weights, too")
    shape.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at once, a run each")
    shape.add_argument("--prompt", type=int, default=512, help="tokens of each")
    shape.add_argument(
        "--prompts",
        type=int,
        help="for the time to the first token of one alone, each another one (default: what fits 2.5 s, at most 9)",
    )
    shape.add_argument("--long", type=int, nargs="*", default=[], help="lengths of prompts to run alone, besides")
    shape.add_argument(
        "--warm-up",
        type=int,
        default=16_384,
        help="tokens of the prompts of the first round, which is not counted, at most",
    )
    shape.add_argument("--profile", type=int, nargs="*", default=[], help="batches to take a decode step apart of")
    shape.add_argument("--context", type=int, default=131_072, help="that the engine has room for")
    shape.add_argument("--batch-tokens", type=int, default=8192, help="of one step")
    shape.add_argument("--kv-bytes", type=int, help="of the KV cache")
    shape.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto", help="of the KV cache")
    shape.add_argument(
        "--prefill-dtype", choices=["auto", "fp8"], default="auto", help="of prompts' products with INT4 weights"
    )
    shape.add_argument("--host-bytes", type=int, default=0, help="of host memory for what the KV cache gives up")
    shape.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    shape.add_argument("--json", action="store_true", help="on one line")
    args = parser.parse_args()
    benchmarks = {"engine": benchmark_engine, "serving": benchmark_serving, "scheduler": benchmark_scheduler}
    if args.shape is not None and args.what == "scheduler":
        parser.error("--shape goes with engine and serving")
    if args.what == "serving" and args.weights == "fp8":
        parser.error("serving takes random weights in bf16 and int4, or --model")
    of_shape = args.shape is not None and args.what == "engine"
    result = benchmark_shape(args) if of_shape else benchmarks[args.what](args)
    indent = None if args.json else 2
    print(json.dumps({"benchmark": args.what, "environment": environment(), "result": result}, indent=indent))


if __name__ == "__main__":
    main()
