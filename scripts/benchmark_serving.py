"""The same streams from the engine in this process and through a real server's gRPC ensemble, in turns.

The clients run in processes of their own, so that they are not what bounds the server. What is compared is the whole
time of all streams, from the first request to the last token, and the rate at which tokens come once an answer has
begun: by the engine's clock, in both, and by the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from scripts.emulated_device import costs_of, emulated, emulating_model
from scripts.serving import Installation, ServerOptions, TritonServer
from scripts.serving.installation import ROOT
from scripts.write_random_gemma3 import write_checkpoint
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.results import Result
from wicore_backend.engine.step_time import Coefficients

_SERVED = "wicore_gemma3"


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a client saw of one answer; times are seconds from its request on.

    Attributes
    ----------
    gaps
        Between one response and the next.
    engine_s_per_token
        Of the tokens after the first, by the engine's clock.
    """

    tokens: int
    responses: int
    first_s: float
    last_s: float
    gaps: tuple[float, ...]
    engine_s_per_token: float


@dataclass(frozen=True, slots=True)
class Questions:
    """Texts, and how many tokens are to follow each."""

    texts: list[str]
    new_tokens: int

    @classmethod
    def of(cls, streams: int, new_tokens: int) -> Questions:
        numbers = range(streams)
        return cls(
            [f"Request {n}: tell me of {n + 2} red circles and {n + 3} blue squares." for n in numbers], new_tokens
        )

    @property
    def tokens(self) -> int:
        return len(self.texts) * self.new_tokens


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, tell: Callable[[dict[str, list[float]]], None] | None = None
) -> dict[str, list[float]]:
    """Seconds that each side takes, one after the other in each round; a first round warms up and is not counted.

    `tell` gets those so far after each round that counts.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            took = seconds(run)
            if round_:
                times[name].append(took)
        if round_ and tell is not None:
            tell(times)
    return times


def run_in_process(
    engine: Engine, prompts: Sequence[Any], new_tokens: Sequence[int], *, raw: bool = False
) -> list[Result]:
    """All requests at once, as streams read by this thread."""
    streams = [
        engine.stream(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), raw=raw)
        for prompt, tokens in zip(prompts, new_tokens, strict=True)
    ]
    results = [stream.collect() for stream in streams]
    assert [len(result.token_ids) for result in results] == list(new_tokens)
    return results


class Clients:
    """Processes that ask a server; each asks for its share of the streams, all at once."""

    def __init__(self, url: str, processes: int) -> None:
        self._url = url
        self._count = processes
        self._processes = ProcessPoolExecutor(processes, get_context("spawn"))

    def run(self, load: Questions) -> list[Streamed]:
        shares = [load.texts[first :: self._count] for first in range(self._count)]
        jobs = [self._processes.submit(_ask_all, self._url, share, load.new_tokens) for share in shares if share]
        return [streamed for job in jobs for streamed in job.result()]

    def cpu_seconds(self) -> float:
        return cpu_seconds(list(self._processes._processes))

    def close(self) -> None:
        self._processes.shutdown()


def _ask_all(url: str, texts: Sequence[str], new_tokens: int) -> list[Streamed]:
    from wicore_client import AsyncClient  # Only here: what measures the engine alone needs no client.

    async def ask(client: AsyncClient, text: str) -> Streamed:
        began = time.perf_counter()
        times, tokens, usage = [], 0, None
        async for chunk in client.stream(text, max_tokens=new_tokens, temperature=0.0, ignore_eos=True, raw=True):
            if chunk.token_ids:
                times.append(time.perf_counter())
                tokens += len(chunk.token_ids)
            usage = chunk.usage or usage
        assert tokens == new_tokens, f"{tokens} tokens came, {new_tokens} were asked for"
        assert usage is not None
        ms = (usage.total_ms or 0.0) - (usage.ttft_ms or 0.0)
        gaps = tuple(after - before for before, after in pairwise(times))
        return Streamed(
            tokens, len(times), times[0] - began, times[-1] - began, gaps, ms / 1e3 / max(1, new_tokens - 1)
        )

    async def all_streams() -> list[Streamed]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(ask(client, text) for text in texts))

    return asyncio.run(all_streams())


def cpu_seconds(pids: Sequence[int]) -> float:
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


def benchmark_serving(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of concurrent streams, in process and over gRPC on the ensemble, and the CPU time between.

    The figures of the rounds so far are told on standard error after each, as one JSON object a line.
    """
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        if args.shape is not None:
            args.model = Path(directory)
            device = torch.device(args.device)
            write_checkpoint(args.shape, args.model, device=device, quantized=args.weights == "int4")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return _compared(args)


def _compared(args: argparse.Namespace) -> dict[str, Any]:
    load = Questions.of(args.streams, args.new)
    costs = costs_of(args)
    alone: list[Result] = []
    streamed: list[Streamed] = []
    cpu: dict[str, list[float]] = {"in process": [], "server": [], "clients": []}
    with emulated(costs), Engine(engine_config(args)) as engine, start_server(args, costs) as (url, server_pid):
        clients = Clients(url, args.client_processes)

        def in_process() -> None:
            began = cpu_seconds([os.getpid()])
            alone[:] = run_in_process(engine, load.texts, [args.new] * args.streams, raw=True)
            cpu["in process"].append(cpu_seconds([os.getpid()]) - began)

        def served() -> None:
            pids = tree(server_pid)
            began, by_clients = cpu_seconds(pids), clients.cpu_seconds()
            streamed[:] = clients.run(load)
            cpu["server"].append(cpu_seconds(pids) - began)
            cpu["clients"].append(clients.cpu_seconds() - by_clients)

        def result(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
            return _figures(args, load, times, alone, streamed, cpu)

        try:
            times = in_turns(
                {"in process": in_process, "served": served},
                args.rounds,
                lambda times: print(json.dumps(result(times)), file=sys.stderr, flush=True),
            )
        finally:
            clients.close()
    return result(times)


def _figures(
    args: argparse.Namespace,
    load: Questions,
    times: Mapping[str, Sequence[float]],
    alone: Sequence[Result],
    streamed: Sequence[Streamed],
    cpu: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Of the rounds so far.

    Parameters
    ----------
    times
        Seconds of each side in each round that counts.
    alone, streamed
        The answers of the last round, in process and through the server.
    cpu
        Seconds of the processors in each round, that of the warm-up first.
    """
    ratios = [p / s for p, s in zip(times["in process"], times["served"], strict=True)]
    cpu_us = {side: statistics.median(spent[1:]) / load.tokens * 1e6 for side, spent in cpu.items()}
    after_first = load.tokens - args.streams
    gaps = sorted(gap for answer in streamed for gap in answer.gaps)
    emulated_costs = costs_of(args)
    return {
        "streams": args.streams,
        "new_tokens_each": args.new,
        "emulated_device": None if emulated_costs is None else asdict(emulated_costs),
        "in_process_tokens_per_s": round(load.tokens / statistics.median(times["in process"]), 1),
        "served_tokens_per_s": round(load.tokens / statistics.median(times["served"]), 1),
        "served_over_in_process": round(statistics.median(ratios), 3),
        "ratios_of_rounds": [round(ratio, 3) for ratio in ratios],
        # Of the last round, once answers have begun: for each stream, then added up.
        "in_process_decode_tokens_per_s": round(sum(1 / (result.usage.tpot_s or 1.0) for result in alone), 1),
        "served_decode_tokens_per_s_by_engine": round(sum(1 / answer.engine_s_per_token for answer in streamed), 1),
        "served_decode_tokens_per_s_by_client": round(
            sum((a.tokens - 1) / max(1e-9, a.last_s - a.first_s) for a in streamed), 1
        ),
        "in_process_ttft_ms": round(statistics.median(result.usage.ttft_s or 0.0 for result in alone) * 1e3, 1),
        "served_ttft_ms": round(statistics.median(answer.first_s for answer in streamed) * 1e3, 1),
        "last_served_ttft_ms": round(max(answer.first_s for answer in streamed) * 1e3, 1),
        "gap_ms": {f"p{p}": round(gaps[len(gaps) * p // 100] * 1e3, 1) for p in (50, 99)} if gaps else {},
        "tokens_per_response": round(after_first / max(1, sum(a.responses - 1 for a in streamed)), 2),
        "cpu_us_per_token": {side: round(spent, 1) for side, spent in cpu_us.items()},
    }


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Of both sides. On CUDA each has memory of its own, in which all streams have room at once."""
    if args.device == "cuda":
        return EngineConfig(
            model=args.model,
            device="cuda",
            max_model_len=args.context,
            max_running=args.streams,
            max_batch_tokens=args.batch_tokens,
            kv_cache_bytes=args.kv_bytes,
            host_cache_bytes=0,  # Each side would take a share of the same memory.
            max_guessed_tokens=0,  # Random weights fall into loops: see benchmark_shape.
        )
    if args.emulated_step_ms is not None:
        return EngineConfig(
            model=args.model, device="cpu", dtype="float32", threads=1, max_running=args.streams, max_guessed_tokens=0
        )
    return EngineConfig(model=args.model, device="cpu", dtype="float32", threads=args.threads)


@contextmanager
def start_server(args: argparse.Namespace, costs: Coefficients | None = None) -> Iterator[tuple[str, int]]:
    """A server of the same model; its gRPC address and process id."""
    settings = engine_config(args).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    with tempfile.TemporaryDirectory() as directory:
        repository = ROOT / "model_repository"
        if costs is not None:
            repository = Path(shutil.copytree(repository, Path(directory) / "repository"))
            (repository / _SERVED / "1" / "model.py").write_text(emulating_model(costs))
        options = ServerOptions(
            model_repository=repository, http_port=0, grpc_port=0, metrics_port=0, settings=settings
        )
        with TritonServer(options, Installation.of_this_environment()) as server:
            yield server.urls.grpc, server.process_id
