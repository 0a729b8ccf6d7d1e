"""A cold tier with its store and its slots, and blocks whose content follows from their names."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.codecs import Codec, make_codec
from wicore_backend.hmt.cold_tier import (
    ColdTier,
    ColdTierLimits,
    Finished,
    store_config,
)
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome, StoreFiles
from wicore_backend.hmt.policy.lru import LRU

GLOBAL, LOCAL = LayerGroup.GLOBAL, LayerGroup.LOCAL


SHAPES = {GLOBAL: (2, 2, 8, 2, 16), LOCAL: (5, 2, 8, 2, 16)}


DTYPE = torch.bfloat16


SLOTS = 24


LIMITS = ColdTierLimits(tray_bytes=1 << 14, trays=3, decode_threads=2, measure_s=3600.0)


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(group: LayerGroup, number: int) -> torch.Tensor:
    """What the block of that name holds: bfloat16 of the group's shape."""
    rng = np.random.default_rng([number, group is LOCAL])
    return torch.from_numpy(rng.standard_normal(SHAPES[group], np.float32)).to(DTYPE)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), two.contiguous().view(torch.int16))


def slot_blocks(group: LayerGroup, numbers: Iterable[int]) -> list[SlotBlock]:
    """The blocks of these numbers, each for the slot of its own number."""
    return [SlotBlock(group, name(number), number) for number in numbers]


class Bench:
    """A tier with its store and its slots, and what a loop thread does with them."""

    def __init__(
        self, directory: Path, codec="exact", *, capacity_bytes=4 << 20, policy=LRU, limits=LIMITS,
        open_files=StoreFiles, fingerprint=b"model", read_deadline_s=5.0, write_deadline_s=5.0, retry_s=5.0,
    ) -> None:  # fmt: skip
        self.codecs: dict[LayerGroup, Codec] = {g: make_codec(codec, shape, DTYPE) for g, shape in SHAPES.items()}
        self.slots = {g: torch.zeros(SLOTS, *shape, dtype=DTYPE) for g, shape in SHAPES.items()}
        self.files: list[StoreFiles] = []

        def opened(*args, **kwargs):
            self.files.append(open_files(*args, **kwargs))
            return self.files[0]

        config = store_config(
            directory,
            capacity_bytes=capacity_bytes,
            codecs=self.codecs,
            fingerprint=fingerprint,
            read_deadline_s=read_deadline_s,
            write_deadline_s=write_deadline_s,
        )
        self.store = NvmeStore(replace(config, retry_s=retry_s), open_files=opened)
        self.news = threading.Event()
        self.tier = ColdTier(self.store, self.codecs, self.slots, policy=policy, woken=self.news.set, limits=limits)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files:
            if isinstance(file, FaultyFiles):
                file.errors.clear()
                file.blocked.clear()
                file.go.set()
        self.tier.close()
        self.tier.finished()
        assert not self.tier.busy
        self.tier.check_integrity()
        self.store.close()

    def put(self, group: LayerGroup, number: int, slot: int) -> SlotBlock:
        """Fill a slot with the block's content."""
        self.slots[group][slot] = content(group, number)
        return SlotBlock(group, name(number), slot)

    def wait(self, count: int, timeout_s: float = 10.0) -> list[Finished]:
        """The next `count` reports."""
        end = time.monotonic() + timeout_s
        ended = self.tier.finished()
        while len(ended) < count:
            assert self.news.wait(end - time.monotonic()), f"{len(ended)} of {count} reports came"
            self.news.clear()
            ended += self.tier.finished()
        assert len(ended) == count
        return ended

    def spill(self, blocks: list[SlotBlock]) -> list[Outcome]:
        """Outcomes in the order of `blocks`."""
        assert self.tier.spill(blocks) == len(blocks)
        ended = {done.block: done.outcome for done in self.wait(len(blocks))}
        return [ended[block] for block in blocks]

    def spill_numbers(self, group: LayerGroup, numbers, *, at_once=SLOTS) -> list[Outcome]:
        """The same for any number of blocks, a few at a time."""
        numbers = list(numbers)
        outcomes: list[Outcome] = []
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            outcomes += self.spill([self.put(group, number, slot) for slot, number in enumerate(part)])
        return outcomes

    def restore(self, blocks: list[SlotBlock], deadline_s=None) -> list[Outcome]:
        """Outcomes in the order of `blocks`, after a look at each slot that should hold something."""
        restore = self.tier.restore(blocks, deadline_s)
        ended = {done.block: done.outcome for done in self.wait(len(blocks))}
        assert restore.done
        return [ended[block] for block in blocks]

    def expected(self, group: LayerGroup, number: int) -> torch.Tensor:
        """What the codec makes of the block."""
        block = content(group, number)[None]
        out = torch.empty_like(block)
        self.codecs[group].decode(self.codecs[group].encode(block), out=out)
        return out[0]

    def right(self, block: SlotBlock) -> bool:
        number = int.from_bytes(block.name, "little")
        return same(self.slots[block.group][block.slot], self.expected(block.group, number))


def wait_for_measurement(bench: Bench) -> None:
    """Wait until the tier has measured the disk, and rests: what it reads meanwhile makes room only later."""
    end = time.monotonic() + 5
    while bench.tier.restore_seconds(1) is None or bench.tier._up._under_way or bench.tier._up._queue:
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def silent_disk(directory: Path) -> Iterator[tuple[Bench, FaultyFiles]]:
    """A tier with global blocks of numbers 0 to SLOTS - 1 on a disk that answers no reads any more, and its files."""
    with Bench(directory, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
        wait_for_measurement(bench)
        (files,) = bench.files
        assert isinstance(files, FaultyFiles)
        files.blocked.add("read")
        yield bench, files
