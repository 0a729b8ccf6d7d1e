"""How soon an answer begins whose prompt's beginning comes back from host memory or from a disk, at a published shape.

    python -m scripts.benchmark_restore --shape gemma-3-27b --kv-dtype fp8 --lengths 32768 130000 --disk /var/tmp

The whole engine with random weights: of one random prompt ever longer beginnings are answered, each computed at first;
then all that is cached is sent down, to host memory and on to the disk, and it is answered again. Times are to the
first token, of one request alone. The disk's own speed is that of reading the store's files past the page cache, by
that number of threads, of several, which is fastest. A decode step is timed with attention mass sampled and without.

`host_rounds` and `disk_rounds` have each round's time to the first token and what it is made of, in seconds from the
request's arrival: `asked_s`, when the copies from host memory were handed over; `issued_s`, how long that took;
`up_end_s`, when the last of them was made; `rest_s`, from then to the first token. `up_gb` are their bytes, `down_gb`
what went the other way meanwhile, and `from_disk_gb` what had to come from the disk before, for `disk_wait_s`. Where a
round of host memory has any of that, host memory did not hold the whole prompt.

Nothing is sent to the disk by an idle engine, at `nvme_write_behind_bytes_per_second`, unless --write-behind
says so: the whole is sent at once, as an engine does that ends, and `disk_down_gb_s` says how fast that was.

With `--emulated-step-ms` nothing is computed and nothing copied to or from the device (`scripts/emulated_device.py`):
with `gemma-3-27b-kv`, which has the keys and values of the largest and hardly a weight, that shows on any machine what
the disk's way takes of a long prompt. `--pace` and its like model the disk, as in `scripts/benchmark_cold_tier.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

from scripts.benchmark_cold_tier import PLAIN_THREADS, ModelledDisk, Pace, PacedFiles, add_modelled_disk, plain
from scripts.benchmark_shape import QUANTIZE, device_memory, random_model
from scripts.emulated_device import add_emulated_device, costs_of, emulated
from scripts.random_gemma3 import SHAPES
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.expectations import Expectations
from wicore_backend.engine.job import Job
from wicore_backend.engine.request import Usage
from wicore_backend.engine.results import Result
from wicore_backend.hmt.nvme import NvmeStore
from wicore_backend.hmt.pool import KVPools, slot_bytes
from wicore_backend.hmt.transfers import Route, Transfer

_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
_MOST_READ = 2 << 30
_PERSIST_S = 60.0
_T = TypeVar("_T")


@dataclass
class _Copies:
    """The copies between host memory and the device of one answer, by the engine's clock.

    Attributes
    ----------
    arrival
        Of the request.
    began, issued, ended
        When each list of copies was handed over, when that was done, and when its last copy was made.
    bytes
        That have been copied each way.
    """

    arrival: float = 0.0
    began: list[float] = field(default_factory=list)
    issued: list[float] = field(default_factory=list)
    ended: list[Future[float]] = field(default_factory=list)
    bytes: dict[Route, int] = field(default_factory=lambda: dict.fromkeys(Route, 0))

    def told(self, usage: Usage) -> dict[str, float]:
        """What a first token was waited for."""
        ttft_s = usage.ttft_s or 0.0
        told = {"ttft_s": round(ttft_s, 4), "disk_wait_s": round(usage.restore_s, 4)}
        told["up_gb"] = round(self.bytes[Route.HOST_TO_DEVICE] / 1e9, 3)
        told["down_gb"] = round(self.bytes[Route.DEVICE_TO_HOST] / 1e9, 3)
        if self.began:
            asked_s = self.began[0] - self.arrival
            issued_s = sum(issued - began for began, issued in zip(self.began, self.issued, strict=True))
            end_s = max(ended.result() for ended in self.ended) - self.arrival
            told |= {"asked_s": round(asked_s, 4), "issued_s": round(issued_s, 4), "up_end_s": round(end_s, 4)}
            told["rest_s"] = round(ttft_s - end_s, 4)
            told["up_gb_s"] = round(self.bytes[Route.HOST_TO_DEVICE] / (end_s - asked_s) / 1e9, 2)
        return told


class Bench:
    """An engine over all tiers, and one prompt."""

    def __init__(self, engine: Engine, tokens: list[int], new: int) -> None:
        self.engine = engine
        self._tokens = tokens
        self._new = new

    def answer(self, length: int) -> Result:
        params = SamplingParams(max_tokens=self._new, temperature=0.0, ignore_eos=True)
        return self.engine.stream(self._tokens[:length], params).collect()

    def restored(self, length: int) -> tuple[Result, dict[str, float]]:
        """An answer whose prompt's beginning is on no device, and what its first token was waited for."""
        noted, fetched = _Copies(), self._bytes_from_disk()
        pools, apply, add = self.engine._model.pools, KVPools.apply, self.engine._add
        sizes = slot_bytes(pools.layout, self.engine.config.host_cache_codec, pools.dtype)

        def noting_arrival(job: Job) -> None:
            noted.arrival = job.request.arrival
            add(job)

        def noting_copies(pools: KVPools, transfers: Iterable[Transfer]) -> Callable[[], None] | None:
            transfers = list(transfers)
            began = time.monotonic()
            written = apply(pools, transfers)
            issued = time.monotonic()
            for transfer in transfers:
                noted.bytes[transfer.route] += sizes[transfer.group]
            if any(transfer.route is Route.HOST_TO_DEVICE for transfer in transfers):
                noted.began.append(began)
                noted.issued.append(issued)
                noted.ended.append(waiting.submit(_moment_after, written, issued))
            return written

        with (
            ThreadPoolExecutor(1) as waiting,
            mock.patch.object(self.engine, "_add", noting_arrival),
            mock.patch.object(KVPools, "apply", noting_copies),
        ):
            result = self.answer(length)
        told = noted.told(result.usage) | {"from_disk_gb": round((self._bytes_from_disk() - fetched) / 1e9, 3)}
        return result, told

    def send_down(self, *, to_disk: bool) -> None:
        """Have the device give up all it has cached, to host memory or on to the disk."""

        def down() -> None:
            model = self.engine._model
            lower = model.blocks.lower
            assert lower is not None
            while not to_disk and model.blocks.give_up(64):
                model.mover.move()
                lower.collect()
            if to_disk:
                cold = model.mover._cold
                assert cold is not None
                model.mover._persist(cold.tier, time.monotonic() + _PERSIST_S)
                lower.forget_all()  # What has been stored is in host memory as well, until others need the room.

        self._on_the_loop(down)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def stored_bytes(self) -> int:
        """That have been written to the disk so far."""
        cold = self.engine._model.mover._cold
        return 0 if cold is None else cold.tier.statistics().store.bytes_written

    def _bytes_from_disk(self) -> int:
        cold = self.engine._model.mover._cold
        return 0 if cold is None else cold.tier.statistics().restored_bytes

    def prefix_bytes(self, length: int) -> int:
        """Of the blocks that a prompt goes on from."""
        layout = self.engine._model.blocks.layout
        held = {group: layout.blocks_held(group, length, 1) for group in layout.groups}
        return sum(count * layout.block_bytes(group) for group, count in held.items())

    def _on_the_loop(self, work: Callable[[], _T]) -> _T:
        done: Future[_T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self.engine._inbox.put(do)
        return done.result(2 * _PERSIST_S)


def _moment_after(written: Callable[[], None] | None, issued: float) -> float:
    """When copies were made that were issued then."""
    if written is None:
        return issued
    written()
    return time.monotonic()


@contextmanager
def _no_full_collections() -> Iterator[None]:
    """As in a server, which has them while it is idle: one takes 0.1 s and more, and would come in some round."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(*thresholds[:2], 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Bench]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(random_model(args.shape, args.weights, directory, like=_MODEL))
        if args.emulated_step_ms is not None:
            stack.enter_context(emulated(costs_of(args)))
            stack.enter_context(mock.patch.object(KVPools, "apply", return_value=None))
            # By its own steps, to compute is quicker than any disk.
            stack.enter_context(mock.patch.object(Expectations, "prefill_seconds", lambda _, to, since: to - since))
        paced = partial(NvmeStore, open_files=partial(PacedFiles, disk=ModelledDisk.of(args)))
        stack.enter_context(mock.patch("wicore_backend.engine.tiers.NvmeStore", paced))
        settings: dict[str, Any] = {}
        if args.disk is not None:
            settings["nvme_cache_path"] = stack.enter_context(tempfile.TemporaryDirectory(dir=args.disk))
            settings["nvme_cache_bytes"] = args.disk_bytes
            settings["nvme_write_behind_bytes_per_second"] = args.write_behind
        engine = Engine(
            EngineConfig(
                model=directory,
                max_model_len=max(args.lengths) + args.new,
                max_running=1,
                max_batch_tokens=args.batch_tokens,
                kv_cache_dtype=args.kv_dtype,
                kv_cache_bytes=args.kv_bytes,
                host_cache_bytes=args.host_bytes,
                nvme_codec="exact",
                **settings,
            )
        )
        stack.enter_context(engine)
        if args.emulated_step_ms is not None:
            for slots in engine._model.pools.host.values():
                slots.view(torch.uint8).numpy().fill(1)  # A card's are in memory from the beginning.
        stack.enter_context(_no_full_collections())
        tokens = np.random.default_rng(0).integers(300, 2000, max(args.lengths)).tolist()
        yield Bench(engine, tokens, args.new)


def disk_speed(directory: Path, pace: Pace | None = None) -> dict[int, float]:
    """Bytes a second of reading the largest file there past the page cache, by so many threads."""
    path = max(directory.rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    size = min(path.stat().st_size, _MOST_READ)
    return {threads: plain(path, size, os.preadv, os.O_RDONLY, threads=threads, pace=pace) for threads in PLAIN_THREADS}


def run(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    def tell(row: dict[str, Any]) -> dict[str, Any]:
        row |= device_memory()
        print(json.dumps(row), file=sys.stderr, flush=True)  # So that a run that is cut short was not for nothing.
        return row

    runner = bench.engine._model.runner
    places = ["host"] if args.disk is None else ["host", "disk"]
    rows = []
    bench.answer(args.lengths[0] // 4)  # Compiles and captures.
    for length in args.lengths:
        computed = bench.answer(length)
        sampled = [(bench.answer(length).usage.tpot_s or 0.0) * 1e3 for _ in range(args.rounds)]
        with mock.patch.object(runner, "sampling", None):
            plain = [(bench.answer(length).usage.tpot_s or 0.0) * 1e3 for _ in range(args.rounds)]
        row = {
            "length": length,
            "cached": computed.usage.cached_tokens,
            "computed_ttft_s": round(computed.usage.ttft_s or 0.0, 3),
            "prefix_bytes": bench.prefix_bytes(length),
            "step_ms": round(statistics.median(sampled), 3),
            "step_without_mass_ms": round(statistics.median(plain), 3),
            "device_ttft_s": round(bench.answer(length).usage.ttft_s or 0.0, 4),
        }
        rows.append(tell(row))
        # At once: the window at the end of this prompt is the first that a longer one lets go of.
        for place in places:
            results, rounds = [], []
            for _ in range(args.rounds if place == "host" else 1):
                began, stored = time.perf_counter(), bench.stored_bytes()
                bench.send_down(to_disk=place == "disk")
                down_s = time.perf_counter() - began
                row[f"{place}_down_s"] = round(down_s, 2)
                if place == "disk":
                    row["disk_down_gb_s"] = round((bench.stored_bytes() - stored) / down_s / 1e9, 2)
                result, told = bench.restored(length)
                results.append(result)
                rounds.append(told | {"down_s": round(down_s, 3)})
            seconds = statistics.median(result.usage.ttft_s or 0.0 for result in results)
            row[f"{place}_cached"] = min(result.usage.cached_tokens for result in results)
            row[f"{place}_ttft_s"] = round(seconds, 4)
            row[f"{place}_rounds"] = rounds
            row[f"{place}_gb_s"] = round(row["prefix_bytes"] / seconds / 1e9, 2)
            if place == "disk":
                nvme = bench.engine.config.nvme_cache_path
                assert nvme is not None
                alone = disk_speed(nvme, ModelledDisk.of(args).reads)
                row["disk_alone_gb_s_by_threads"] = {by: round(speed / 1e9, 2) for by, speed in alone.items()}
                row["disk_alone_gb_s"] = round(max(alone.values()) / 1e9, 2)
                row["disk_share"] = round(row["disk_gb_s"] / row["disk_alone_gb_s"], 3)
            tell(row)
    return {"shape": args.shape, "weights": args.weights, "kv": args.kv_dtype, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gemma-3-27b", help="of a model; its weights are random")
    parser.add_argument("--weights", choices=QUANTIZE, default="bf16")
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 130_000], help="of the prompt, rising")
    parser.add_argument("--new", type=int, default=33, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of one step")
    parser.add_argument("--kv-bytes", type=int, help="of the KV cache on the device")
    parser.add_argument("--host-bytes", type=int, help="of host memory for what it gives up")
    parser.add_argument("--disk", type=Path, help="a directory for what host memory gives up; without, no disk")
    parser.add_argument("--disk-bytes", type=int, default=20 * 2**30)
    parser.add_argument(
        "--write-behind", type=int, default=0, help="bytes a second that an idle engine stores; 0: none"
    )
    add_emulated_device(parser)
    add_modelled_disk(parser)
    args = parser.parse_args()
    with opened(args) as bench:
        print(json.dumps(run(args, bench)))


if __name__ == "__main__":
    main()
