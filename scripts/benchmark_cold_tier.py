"""What share of a disk's own speed the cold tier reaches, up and down, with a long prompt's blocks and no model.

    python -m scripts.benchmark_cold_tier --directory /var/tmp --tokens 32768

The blocks that a prompt of gemma-3-27b goes on from, with random bytes, are spilled from slots of host memory through
`hmt/cold_tier`, as the engine does it, and restored into other slots. In each round, one after the other:

- *own*: the disk's own speed, plain direct I/O of 4 MiB at a time by that number of threads, of several, which is
  fastest; reads are of the store's own file, before the tier's and once more after them, writes to a file beside it;
- *store*: records between the disk and memory, checked, without the tier;
- *tier*: blocks between slots and the disk.

Shares are of *own* in the same round, of the mean of both where there are two, and medians. What a disk contradicts
itself by from one reading to the next is told beside them. The last lines are what a thread does alone, in memory.

With `--pace` the disk is a model: calls take their turns at so many GB/s, whoever asks, and each takes its own time
(`--pace-stream`, `--pace-latency-ms`), so that only several at once reach what the disk can. On `/dev/shm` that leaves
nothing of the disk in the figures, and shows up to which disk the tier keeps pace on the CPUs there are.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.cold_tier import ColdTier, ColdTierLimits, store_config
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.cold_tier.staging import Stage, staging_for
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome, StoreFiles
from wicore_backend.hmt.nvme.files import aligned_buffer
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.nvme.transfer import checked_copy
from wicore_backend.hmt.policy.lru import LRU

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL
PIECE = 4 << 20
PLAIN_THREADS = (4, 8, 16)
"""Of plain I/O: the fastest is the disk's own speed, so that nobody is compared with a shorter queue than its own."""
_OWN_BYTES = 1 << 30
"""That so many threads move, at most."""
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def layout_of(dtype: torch.dtype) -> KVLayout:
    """Gemma-3-27B's."""
    groups = [G if (layer + 1) % 6 == 0 else L for layer in range(62)]
    return KVLayout.of(groups, block_size=32, kv_heads=16, head_dim=128, window=1024, bytes_per_value=dtype.itemsize)


class Pace:
    """When what is moved one way would have been moved by a disk of such a speed.

    Parameters
    ----------
    bytes_per_second
        Of all calls together.
    stream_bytes_per_second
        Of one call, however few others there are.
    latency_s
        Of each call, beside what its bytes take.
    """

    def __init__(self, bytes_per_second: float, *, stream_bytes_per_second: float, latency_s: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._stream_bytes_per_second = stream_bytes_per_second
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    @contextmanager
    def moving(self, size: int) -> Iterator[None]:
        """Take as long as so many bytes do, what is done within included."""
        with self._lock:
            began = time.monotonic()
            self._free_at = max(began, self._free_at) + size / self._bytes_per_second
            at = max(self._free_at, began + self._latency_s + size / self._stream_bytes_per_second)
        yield
        time.sleep(max(0.0, at - time.monotonic()))


class ModelledDisk(NamedTuple):
    """How fast each way is; None is as fast as it is."""

    reads: Pace | None
    writes: Pace | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> ModelledDisk:
        """The disk that the options of `add_modelled_disk` describe."""

        def pace(speed: float | None) -> Pace | None:
            if speed is None:
                return None
            return Pace(
                1e9 * speed, stream_bytes_per_second=1e9 * args.pace_stream, latency_s=args.pace_latency_ms / 1e3
            )

        return cls(pace(args.pace), pace(args.pace_write))


def add_modelled_disk(parser: argparse.ArgumentParser) -> None:
    """Options that describe a disk."""
    parser.add_argument("--pace", type=float, help="GB/s of a modelled disk, for reads")
    parser.add_argument("--pace-write", type=float, help="the same for writes")
    parser.add_argument("--pace-stream", type=float, default=inf, help="GB/s of one call of it")
    parser.add_argument("--pace-latency-ms", type=float, default=0.0, help="of each call of it, beside that")


class PacedFiles(StoreFiles):
    """A store's files on a modelled disk."""

    def __init__(self, *args: Any, disk: ModelledDisk, **shape: Any) -> None:
        super().__init__(*args, **shape)
        self._disk = disk

    def read(self, run: Run, into: memoryview) -> None:
        """See StoreFiles."""
        with _moving(self._disk.reads, len(into)):
            super().read(run, into)

    def write(self, run: Run, pieces: list[memoryview]) -> None:
        """See StoreFiles."""
        with _moving(self._disk.writes, sum(map(len, pieces))):
            super().write(run, pieces)


def _moving(pace: Pace | None, size: int) -> AbstractContextManager[None]:
    return nullcontext() if pace is None else pace.moving(size)


def plain(
    path: Path,
    size: int,
    call: Callable[[int, list[mmap.mmap], int], int],
    flags: int,
    *,
    threads: int,
    pace: Pace | None,
) -> float:
    """Bytes a second of plain I/O past the page cache, whole pieces of the file's first `size` bytes."""
    handle = os.open(path, flags | os.O_DIRECT)
    size = size // PIECE * PIECE
    rooms = [mmap.mmap(-1, PIECE) for _ in range(threads)]
    content = random.Random(0).randbytes(PIECE)
    for room in rooms:
        room.write(content)

    def move(first: int) -> None:
        for at in range(first * PIECE, size, threads * PIECE):
            with _moving(pace, PIECE):
                call(handle, [rooms[first]], at)

    try:
        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            list(pool.map(move, range(threads)))
            return size / (time.perf_counter() - began)
    finally:
        os.close(handle)


class Bench:
    """A store and its tier, and slots with the blocks of one prompt."""

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        dtype = DTYPES[args.kv_dtype]
        layout = layout_of(dtype)
        self.counts = {group: layout.blocks_held(group, args.tokens, 1) for group in layout.groups}
        rng = np.random.default_rng(0)
        self.slots = {
            group: torch.from_numpy(
                rng.integers(0, 1 << 64, count * layout.block_bytes(group) // 8, np.uint64).view(np.uint8)
            )
            .view(dtype)
            .view(count, *layout.block_shape(group))
            for group, count in self.counts.items()
        }
        if args.kv_dtype == "bf16":  # Bytes that are numbers, for codecs that compute with them.
            for slots in self.slots.values():
                slots.copy_(torch.randn(slots.shape[1:], dtype=torch.float32).to(dtype))
        self.codecs = {group: make_codec(args.codec, layout.block_shape(group), dtype) for group in layout.groups}
        self.bytes = sum(count * layout.block_bytes(group) for group, count in self.counts.items())
        self.record_bytes = sum(count * self.codecs[group].encoded_bytes for group, count in self.counts.items())
        self.directory = directory
        self.disk = ModelledDisk.of(args)
        self.store = NvmeStore(
            store_config(
                directory,
                capacity_bytes=int(1.1 * self.record_bytes) + (16 << 20),
                codecs=self.codecs,
                fingerprint=b"benchmark",
                read_deadline_s=30.0,
                write_deadline_s=60.0,
            ),
            open_files=partial(PacedFiles, disk=self.disk),
        )
        self.tier = ColdTier(
            self.store,
            self.codecs,
            self.slots,
            policy=LRU,
            woken=lambda: None,
            limits=ColdTierLimits(measure_s=3600.0, **dict(args.limits)),
        )
        self._round = 0

    def close(self) -> None:
        self.tier.close()
        self.store.close()

    def blocks(self) -> list[SlotBlock]:
        """Those of the prompt, in the order in which the engine asks for them: by group, from the root on."""
        return [
            SlotBlock(group, self._round.to_bytes(8, "little") + number.to_bytes(8, "little"), number)
            for group, count in self.counts.items()
            for number in range(count)
        ]

    def spill(self) -> float:
        """Bytes a second of the blocks, in slots, on their way to the disk. They are new to it."""
        self._round += 1
        left = self.blocks()
        began = time.perf_counter()
        while left or self.tier.busy:
            if left:
                left = left[self.tier.spill(left) :]
            time.sleep(0.002)
            assert all(ended.there for ended in self.tier.finished())
        return self.bytes / (time.perf_counter() - began)

    def restore(self) -> float:
        """Bytes a second of the blocks, in slots, that come back, into slots in another order."""
        blocks = [block._replace(slot=self.counts[block.group] - 1 - block.slot) for block in self.blocks()]
        began = time.perf_counter()
        restore = self.tier.restore(blocks)
        while not restore.done:
            time.sleep(0.001)
            assert all(ended.outcome is Outcome.DONE for ended in self.tier.finished())
        return self.bytes / (time.perf_counter() - began)

    def fetch(self) -> float:
        """Bytes a second of the records, checked, that the store brings into memory."""
        blocks = self.blocks()
        sizes = [self.codecs[block.group].encoded_bytes for block in blocks]
        room = memoryview(aligned_buffer(4 * max(sizes) * len(self.counts)))
        names = [record_name(block.key) for block in blocks]
        began = time.perf_counter()
        ticket = self.store.fetch(names, [room[:size] for size in sizes], deadline_s=60.0)
        ticket.wait()
        seconds = time.perf_counter() - began
        assert set(ticket.outcomes) == {Outcome.DONE}
        return self.record_bytes / seconds

    def in_memory(self) -> dict[str, float]:
        """Bytes a second, of records, of what one thread does for each block."""
        codec, slots = self.codecs[G], self.slots[G]
        stage, count = Stage(codec, slots), min(64, len(slots))
        staging = staging_for([stage])
        records = torch.empty(count, codec.encoded_bytes, dtype=torch.uint8)
        into = torch.empty_like(records)
        stage.encode(range(count), records, staging)
        views = [(memoryview(a.numpy()), memoryview(b.numpy())) for a, b in zip(into, records, strict=True)]
        work: dict[str, Callable[[], Any]] = {
            "encode": lambda: stage.encode(range(count), records, staging),
            "decode": lambda: stage.decode(records, range(count), staging),
            "checksum_and_copy": lambda: [checked_copy(*pair) for pair in views],
        }
        return {what: records.numel() / median(_seconds(do) for _ in range(5)) for what, do in work.items()}


def _seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-cold-tier-") as directory:
        bench = Bench(Path(directory), args)
        try:
            yield bench
        finally:
            bench.close()


def run(bench: Bench, rounds: int) -> dict[str, Any]:
    """GB/s as medians, and shares of the disk's own speed."""
    beside = bench.directory / "plain"
    size = min(bench.record_bytes, _OWN_BYTES)
    speeds: dict[str, list[float]] = {}
    cpu_seconds: list[float] = []
    handle = os.open(beside, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(handle, 0, size)
    os.close(handle)
    plain(beside, size, os.pwritev, os.O_WRONLY, threads=PLAIN_THREADS[0], pace=None)
    bench.spill()  # On space that was never written to.

    def own(way: str, path: Path, call: Callable[..., int], flags: int, pace: Pace | None) -> float:
        by_threads = [plain(path, size, call, flags, threads=threads, pace=pace) for threads in PLAIN_THREADS]
        for threads, speed in zip(PLAIN_THREADS, by_threads, strict=True):
            speeds.setdefault(f"own_{way}_{threads}_threads", []).append(speed)
        return max(by_threads)

    def own_read() -> float:
        return own("read", bench.directory / "slots", os.preadv, os.O_RDONLY, bench.disk.reads)

    def own_write() -> float:
        return own("write", beside, os.pwritev, os.O_WRONLY, bench.disk.writes)

    def up() -> tuple[float, float]:
        cpu = time.process_time()
        speed = bench.restore()
        return speed, (time.process_time() - cpu) / bench.record_bytes

    for _ in range(rounds):
        writes, tier_down = own_write(), bench.spill()
        before, (tier_up, cpu_up), after = own_read(), up(), own_read()
        measured = {
            "own_write": writes,
            "tier_down": tier_down,
            "own_read": 2 / (1 / before + 1 / after),
            "own_read_again": after,
            "own_read_first": before,
            "tier_up": tier_up,
            "store_up": bench.fetch(),
        }
        for what, speed in measured.items():
            speeds.setdefault(what, []).append(speed)
        cpu_seconds.append(cpu_up)
    scale = bench.record_bytes / bench.bytes  # Of the disk, not of slots.

    def share(what: str, own: str, scale: float = 1.0) -> float:
        return round(median(scale * a / b for a, b in zip(speeds[what], speeds[own], strict=True)), 3)

    return {
        "bytes": bench.bytes,
        "on_disk": bench.record_bytes,
        "direct": bench.store._files.direct,
        "gb_s": {what: round(median(values) / 1e9, 3) for what, values in speeds.items()},
        "shares": {
            "tier_down": share("tier_down", "own_write", scale),
            "tier_up": share("tier_up", "own_read", scale),
            "store_up": share("store_up", "own_read"),
            "own_read_again": share("own_read_again", "own_read_first"),
        },
        "tier_up_cpu_s_per_gb_on_disk": round(1e9 * median(cpu_seconds), 3),
        "one_thread_in_memory_gb_s": {what: round(speed / 1e9, 2) for what, speed in bench.in_memory().items()},
    }


def _limit(text: str) -> tuple[str, int]:
    name, value = text.split("=")
    return name, int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk in question; what is put there is removed")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the prompt")
    parser.add_argument("--kv-dtype", choices=DTYPES, default="fp8")
    parser.add_argument(
        "--codec", choices=["exact", "q8", "q4"], default="exact", help="of the disk; lossy: bf16 alone"
    )
    parser.add_argument("--rounds", type=int, default=5)
    add_modelled_disk(parser)
    parser.add_argument("--limits", type=_limit, nargs="*", default=[], help="of the tier, such as trays=8")
    args = parser.parse_args(arguments)
    with opened(args) as bench:
        print(json.dumps(vars(args) | run(bench, args.rounds), default=str))


if __name__ == "__main__":
    main()
