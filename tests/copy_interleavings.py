"""Random spills, loads, forks and steps over pools, and a plain model that does the same in order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.hmt.codecs import Codec
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.streamed_copies import StreamedCopies
from wicore_backend.hmt.streams import Event, Stream, Streams
from wicore_backend.hmt.transfers import Route, Transfer

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL
BLOCKS, SLOTS = 10, 8
LAYOUT = KVLayout.of([L, L, G, L, G, G], block_size=2, kv_heads=1, head_dim=16, window=8, bytes_per_value=4)

Hook = Callable[[Stream, Stream], bool]
"""Whether a stream that is to wait for an event of another is to do so."""

EDGES = [
    (Stream.SWAP, Stream.STEP),
    (Stream.STEP, Stream.SWAP),
    (Stream.SWAP, Stream.DRAIN),
    (Stream.DRAIN, Stream.SWAP),
]
"""Which stream waits for which."""


@dataclass(frozen=True)
class SimulatedEvent:
    streams: SimulatedStreams
    stream: Stream
    position: int

    @property
    def reached(self) -> bool:
        return self.streams.done[self.stream] >= self.position

    def synchronize(self) -> None:
        while not self.reached:
            self.streams.advance()


class SimulatedStreams:
    """Streams on a CPU, each with a pace of its own. Which of those that can go on does so next is left to chance."""

    def __init__(self, rng: random.Random, obey: Hook = lambda *_: True) -> None:
        self._rng = rng
        self._obey = obey
        self._pace = {stream: 2.0 ** -rng.randrange(10) for stream in Stream}
        self.done = dict.fromkeys(Stream, 0)
        self._given = dict.fromkeys(Stream, 0)
        self._queues: dict[Stream, deque[Callable[[], object] | SimulatedEvent]] = {s: deque() for s in Stream}

    def run(self, stream: Stream, work: Callable[[], object]) -> None:
        self._queues[stream].append(work)
        self._given[stream] += 1

    def record(self, stream: Stream, *, for_threads: bool = False) -> SimulatedEvent:
        del for_threads
        return SimulatedEvent(self, stream, self._given[stream])

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        if self._obey(stream, event.stream):
            self.wait_indeed(stream, event)

    def wait_indeed(self, stream: Stream, event: SimulatedEvent) -> None:
        self._queues[stream].append(event)
        self._given[stream] += 1

    def upload(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers)

    def advance(self) -> bool:
        """Have one stream do one thing; False if there is nothing to do."""
        able = [
            stream
            for stream, queue in self._queues.items()
            if queue and (not isinstance(queue[0], SimulatedEvent) or queue[0].reached)
        ]
        if not able:
            assert not any(self._queues.values()), "all streams wait for each other"
            return False
        (stream,) = self._rng.choices(able, [self._pace[stream] for stream in able])
        head = self._queues[stream].popleft()
        if not isinstance(head, SimulatedEvent):
            head()
        self.done[stream] += 1
        return True


class Story:
    """Does things to pools and to the plain model, and compares what was read.

    Parameters
    ----------
    pools, slots
        For each group the blocks and the slots under test: both float32 [n, *block], or uint8 slots for a codec.
    copies
        Has `apply` and `wait`.
    step
        Has work done on the steps' stream.
    """

    def __init__(
        self,
        rng: random.Random,
        pools: Mapping[LayerGroup, Tensor],
        slots: Mapping[LayerGroup, Tensor],
        codecs: Mapping[LayerGroup, Codec],
        copies: Any,
        step: Callable[[Callable[[], None]], None],
    ) -> None:
        self._rng = rng
        self._pools = pools
        self._slots = slots
        self._codecs = codecs
        self._copies = copies
        self._step = step
        self._blocks_model = {group: pool.cpu().clone() for group, pool in pools.items()}
        self._slots_model = {group: of_group.clone() for group, of_group in slots.items()}
        self._read: list[tuple[str, Tensor, Tensor]] = []
        self._values = torch.Generator().manual_seed(rng.randrange(2**31))

    def go_on(self) -> None:
        """One thing more."""
        self._rng.choices([self._move, self._compute, self._touch_slots], [4, 4, 1])[0]()

    def compare(self) -> None:
        """Raise AssertionError unless everything that was read, and all that there is now, is what the model has."""
        for what, read, expected in self._read:
            assert torch.equal(read.cpu(), expected), what
        for group in self._pools:
            assert torch.equal(self._pools[group].cpu(), self._blocks_model[group]), f"{group} blocks in the end"
            assert torch.equal(self._slots[group], self._slots_model[group]), f"{group} slots in the end"

    def _move(self) -> None:
        transfers = [self._transfer() for _ in range(self._rng.randrange(1, 12))]
        self._written = self._copies.apply(transfers)
        for transfer in transfers:
            self._follow(transfer)

    def _transfer(self) -> Transfer:
        group, route = self._rng.choice((G, L)), self._rng.choices(list(Route), [1, 4, 4])[0]
        block, slot = self._rng.randrange(BLOCKS), self._rng.randrange(SLOTS)
        match route:
            case Route.DEVICE_TO_HOST:
                return Transfer(route, group, block, slot)
            case Route.HOST_TO_DEVICE:
                return Transfer(route, group, slot, block)
        return Transfer(route, group, block, (block + self._rng.randrange(1, BLOCKS)) % BLOCKS)

    def _follow(self, transfer: Transfer) -> None:
        blocks, slots = self._blocks_model[transfer.group], self._slots_model[transfer.group]
        codec = self._codecs.get(transfer.group)
        source, target = transfer.source, transfer.target
        match transfer.route:
            case Route.WITHIN_DEVICE:
                blocks[target] = blocks[source]
            case Route.DEVICE_TO_HOST:
                slots[target] = blocks[source] if codec is None else codec.encode(blocks[source : source + 1])[0]
            case Route.HOST_TO_DEVICE if codec is None:
                blocks[target] = slots[source]
            case Route.HOST_TO_DEVICE:
                codec.decode(slots[source : source + 1], out=blocks[target : target + 1])

    def _compute(self) -> None:
        """A step: each layer reads blocks, and writes others. It may fail on the way, and be tried again."""
        writes: dict[int, tuple[int, Tensor]] = {}
        for last in (self._rng.randrange(len(LAYOUT.layers)), len(LAYOUT.layers) - 1):
            for layer, (group, index) in enumerate(LAYOUT.layers[: last + 1]):
                self._copies.wait(layer)
                block, values = writes.setdefault(
                    layer,
                    (self._rng.randrange(BLOCKS), torch.randn(LAYOUT.block_shape(group)[1:], generator=self._values)),
                )
                read = self._rng.randrange(BLOCKS)
                self._blocks_model[group][block, index] = values
                expected = self._blocks_model[group][read, index].clone()
                self._do(f"layer {layer}", group, index, block, values, read, expected)
            if self._rng.random() < 0.7:
                return

    def _do(
        self, what: str, group: LayerGroup, index: int, block: int, values: Tensor, read: int, expected: Tensor
    ) -> None:
        def work() -> None:
            pool = self._pools[group]
            pool[block, index] = values if pool.device.type == "cpu" else _uploaded(values, pool.device)
            self._read.append((what, pool[read, index].clone(), expected))

        self._step(work)

    def _touch_slots(self) -> None:
        """What the cold tier's threads do."""
        if (written := getattr(self, "_written", None)) is None:
            return
        written()
        group, slot = self._rng.choice((G, L)), self._rng.randrange(SLOTS)
        mine, model = self._slots[group][slot], self._slots_model[group][slot]
        self._read.append(("a slot", mine.clone(), model.clone()))
        if mine.dtype == torch.uint8:
            other = self._slots_model[group][self._rng.randrange(SLOTS)].clone()  # Something that can be decoded.
        else:
            other = torch.randn(mine.shape, generator=self._values)
        mine.copy_(other)
        model.copy_(other)


def _uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Without waiting for anything."""
    return values.pin_memory().to(device, non_blocking=True)


def obey_all_but(edge: tuple[Stream, Stream] | None) -> Hook:
    return lambda waits, what: (waits, what) != edge


def copies_over(
    rng: random.Random,
    pools: Mapping[LayerGroup, Tensor],
    records: Mapping[LayerGroup, Tensor],
    codecs: dict[LayerGroup, Codec],
    *,
    streams: Streams,
    copy_rows: Any,
    parts: bool,
) -> tuple[StreamedCopies, Mapping[LayerGroup, Tensor], dict[LayerGroup, Codec]]:
    """Copies between pools and the records of slots; and slots and codecs as a Story takes them."""
    slots = records
    if all(codec.name == "exact" for codec in codecs.values()):
        codecs = {}
        slots = {g: rows.view(torch.float32).view(-1, *LAYOUT.block_shape(g)) for g, rows in records.items()}
    copies = StreamedCopies(
        LAYOUT,
        pools,
        records,
        codecs,
        streams=streams,
        copy_rows=copy_rows,
        staging_bytes=0,
        large_bytes=0 if parts else 2**40,
        engine_bytes=rng.choice([0, 2**40]),
        trays=2,
    )
    copies.warm_up()
    return copies, slots, codecs
