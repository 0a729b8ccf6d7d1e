"""Measures Wicore and prints one JSON object.

    python -m scripts.benchmark engine    the engine in this process against transformers' generate, same weights;
                                          with --shape, its speed at a published shape with random weights
    python -m scripts.benchmark serving   the same load in this process and through a real server's gRPC ensemble
    python -m scripts.benchmark scheduler what planning takes of a step; no model

Figures that are compared come from one run, taken in turns, and are medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmark_shape import benchmark_shape
from scripts.random_gemma3 import SHAPES
from scripts.scheduling_cost import benchmark_scheduler
from scripts.serving import Installation, ServerOptions, TritonServer
from wicore_backend import Engine, EngineConfig, SamplingParams

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


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each side takes, one after the other in each round; a first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            took = seconds(run)
            if round_:
                times[name].append(took)
    return times


def run_in_process(engine: Engine, prompts: Sequence[Any], new_tokens: Sequence[int], *, raw: bool = False) -> None:
    """All requests at once, as streams read by this thread."""
    streams = [
        engine.stream(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), raw=raw)
        for prompt, tokens in zip(prompts, new_tokens, strict=True)
    ]
    for stream, tokens in zip(streams, new_tokens, strict=True):
        assert len(stream.collect().token_ids) == tokens


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


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # It ended meanwhile.
            continue
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def run_through_server(url: str, texts: Sequence[str], new_tokens: int) -> int:
    """All requests as concurrent streams on one event loop; returns how many responses carried them."""
    from wicore_client import AsyncClient  # What measures the engine alone needs no client.

    async def stream(async_client: AsyncClient, text: str) -> int:
        responses = tokens = 0
        async for chunk in async_client.stream(text, max_tokens=new_tokens, temperature=0.0, ignore_eos=True, raw=True):
            responses += 1
            tokens += len(chunk.token_ids)
        assert tokens == new_tokens, f"{tokens} tokens came, {new_tokens} were asked for"
        return responses

    async def all_streams() -> int:
        async with AsyncClient(url) as async_client:
            return sum(await asyncio.gather(*(stream(async_client, text) for text in texts)))

    return asyncio.run(all_streams())


def benchmark_serving(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of concurrent streams, in process and over gRPC on the ensemble, and the CPU time between."""
    texts = [
        f"Request {index}: tell me of {index + 2} red circles and {index + 3} blue squares."
        for index in range(args.streams)
    ]
    tokens = args.streams * args.new
    responses: list[int] = []
    cpu: dict[str, list[float]] = {"in process": [], "served": []}
    with Engine(engine_config(args)) as engine, start_server(args) as (url, server_pid):

        def in_process() -> None:
            began = cpu_seconds([os.getpid()])
            run_in_process(engine, texts, [args.new] * args.streams, raw=True)
            cpu["in process"].append(cpu_seconds([os.getpid()]) - began)

        def served() -> None:
            pids = [os.getpid(), *tree(server_pid)]
            began = cpu_seconds(pids)
            responses.append(run_through_server(url, texts, args.new))
            cpu["served"].append(cpu_seconds(pids) - began)

        times = in_turns({"in process": in_process, "served": served}, args.rounds)
    ratios = [p / s for p, s in zip(times["in process"], times["served"], strict=True)]
    added = [(s - p) / tokens for s, p in zip(cpu["served"][1:], cpu["in process"][1:], strict=True)]
    return {
        "streams": args.streams,
        "new_tokens_each": args.new,
        "in_process_tokens_per_s": round(tokens / statistics.median(times["in process"]), 1),
        "served_tokens_per_s": round(tokens / statistics.median(times["served"]), 1),
        "served_over_in_process": round(statistics.median(ratios), 3),
        "tokens_per_response": round(tokens / statistics.median(responses[1:]), 2),
        "cpu_us_added_per_token": round(statistics.median(added) * 1e6, 1),
        "cpu_us_in_process_per_token": round(statistics.median(cpu["in process"][1:]) / tokens * 1e6, 1),
    }


def engine_config(args: argparse.Namespace) -> EngineConfig:
    if args.device == "cuda":  # Twice beside each other where a server is measured against it.
        return EngineConfig(model=args.model, device="cuda", max_running=args.streams, kv_cache_bytes=args.kv_bytes)
    return EngineConfig(model=args.model, device="cpu", dtype="float32", threads=args.threads)


@contextmanager
def start_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server of the same model; its gRPC address and process id."""
    settings = engine_config(args).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0, settings=settings)
    with TritonServer(options, Installation.of_this_environment()) as server:
        yield server.urls.grpc, server.process_id


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
    parser.add_argument("--running", type=int, default=256, help="sequences that run, for the scheduler")
    parser.add_argument("--waiting", type=int, default=1000, help="and that wait")
    parser.add_argument("--steps", type=int, default=1000, help="of a round")
    shape = parser.add_argument_group("engine --shape")
    shape.add_argument("--shape", choices=SHAPES, help="of a published model; its weights are random")
    shape.add_argument("--weights", choices=["bf16", "fp8", "int4"], default="bf16")
    shape.add_argument("--head", action="store_true", help="in the type of --weights, too")
    shape.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at once, a run each")
    shape.add_argument("--prompt", type=int, default=512, help="tokens of each")
    shape.add_argument("--long", type=int, nargs="*", default=[], help="lengths of prompts to run alone, besides")
    shape.add_argument("--profile", type=int, nargs="*", default=[], help="batches to take a decode step apart of")
    shape.add_argument("--context", type=int, default=131_072, help="that the engine has room for")
    shape.add_argument("--batch-tokens", type=int, default=8192, help="of one step")
    shape.add_argument("--kv-bytes", type=int, help="of the KV cache")
    shape.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto", help="of the KV cache")
    shape.add_argument("--host-bytes", type=int, default=0, help="of host memory for what the KV cache gives up")
    shape.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    shape.add_argument("--json", action="store_true", help="on one line")
    args = parser.parse_args()
    benchmarks = {"engine": benchmark_engine, "serving": benchmark_serving, "scheduler": benchmark_scheduler}
    if args.shape is not None and args.what != "engine":
        parser.error("--shape goes with engine")
    result = benchmark_shape(args) if args.shape is not None else benchmarks[args.what](args)
    indent = None if args.json else 2
    print(json.dumps({"benchmark": args.what, "environment": environment(), "result": result}, indent=indent))


if __name__ == "__main__":
    main()
