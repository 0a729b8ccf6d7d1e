"""Makes transfers on streams beside the steps. What holds while it does is in `hmt/transfers.py`, by number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.hmt.codecs import Codec, make_codec
from wicore_backend.hmt.layout import KVLayout, LayerGroup, Part
from wicore_backend.hmt.streams import Event, Stream, Streams
from wicore_backend.hmt.transfers import Round, Transfer, in_rounds

_TRAYS = 8
LARGE_BYTES = 128 << 20
"""Loads of so many bytes, over 2 ms, are made part by part, so that the step begins before all have come. Each part
costs 0.1 ms of the host's time."""
ENGINE_BYTES = 2 << 20
"""Rows of so many bytes are copied over PCIe by the copy engines, each in a call of its own: at 55 GB/s, and without
taking the step's processors. It costs the host 6 us a row; for smaller ones a kernel is quicker."""


_NONE = np.zeros(0, np.int64)


class CopyRows(Protocol):
    """`row_copies.copy_rows`, or its twin."""

    def __call__(
        self,
        source: Tensor,
        target: Tensor,
        count: int,
        *,
        sources: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """Transfers of one group and route: their two sides, int64 [n], here and on the device."""

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    device_sources: Tensor
    device_targets: Tensor

    @property
    def count(self) -> int:
        return len(self.sources)

    def batches(self, most: int) -> Iterator[_Moves]:
        for start in range(0, self.count, most):
            part = slice(start, start + most)
            yield _Moves(self.sources[part], self.targets[part], self.device_sources[part], self.device_targets[part])


@dataclass(eq=False, slots=True)
class _Tray:
    """Memory on the device that records pass through on their way down: uint8 [size]. Empty after the event."""

    memory: Tensor
    emptied: Event | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """Layers of a group, as rows of words: blocks of the pool, and their records, in slots and in trays."""

    group: LayerGroup
    blocks: Tensor
    slots: Tensor | None
    codec: Codec | None
    """None where records are the blocks' own bytes."""

    @property
    def record_bytes(self) -> int:
        assert self.slots is not None
        return self.slots.shape[1] * self.slots.itemsize

    @property
    def block_bytes(self) -> int:
        return self.blocks.shape[1] * self.blocks.itemsize


class StreamedCopies:
    """See the module's docstring.

    Parameters
    ----------
    pools
        For each group the device's blocks [blocks, *layout.block_shape(group)].
    slots
        For each group of the host tier its slots, uint8 [slots, bytes of a record].
    codecs
        How blocks are written there; none for a group whose records are the blocks themselves.
    staging_bytes
        Memory on the device for what is on its way, about: more if blocks are large.
    large_bytes
        Loads of so many bytes are made part by part, as are spills that no trays can take.
    engine_bytes
        Rows of so many bytes go over PCIe one by one.
    """

    def __init__(
        self,
        layout: KVLayout,
        pools: Mapping[LayerGroup, Tensor],
        slots: Mapping[LayerGroup, Tensor],
        codecs: Mapping[LayerGroup, Codec],
        *,
        streams: Streams,
        copy_rows: CopyRows,
        staging_bytes: int,
        large_bytes: int = LARGE_BYTES,
        engine_bytes: int = ENGINE_BYTES,
        trays: int = _TRAYS,
    ) -> None:
        self._layout = layout
        self._streams = streams
        self._copy_rows = copy_rows
        self._large_bytes = large_bytes
        self._engine_bytes = engine_bytes
        self._whole = self._spans(layout.whole, pools, slots, codecs)
        self._parts = [(part.first_layer, self._spans(part, pools, slots, codecs)) for part in layout.parts]
        device = next(iter(pools.values())).device
        spans = [span for span in self._whole if span.slots is not None]
        ratio = max((span.block_bytes / span.record_bytes for span in spans if span.codec is not None), default=0.0)
        shares = trays + (1 + ratio if ratio else 0)
        self._staged = max((int(staging_bytes / shares), *(span.record_bytes for span in spans))) if spans else 0
        self._trays = deque(_Tray(torch.empty(self._staged, dtype=torch.uint8, device=device)) for _ in range(trays))
        spans += [span for _, of_part in self._parts for span in of_part]
        blocks = [self._staged // span.record_bytes * span.block_bytes for span in spans if span.codec is not None]
        # With a codec, for SWAP alone: blocks that are not in the pool, and records on their way up.
        self._raw = torch.empty(max(blocks, default=0), dtype=torch.uint8, device=device)
        self._encoded = torch.empty(self._staged if blocks else 0, dtype=torch.uint8, device=device)
        # Batches of spills have numbers: for each slot that of the last one into it.
        self._spilled = {group: np.zeros(len(of_group), np.int64) for group, of_group in slots.items()}
        self._spills = 0
        self._draining: deque[tuple[int, Event]] = deque(maxlen=trays)
        self._loads_after = 0  # SWAP waits for the batch of that number, and so for all before.
        self._arriving: deque[tuple[int, Event]] = deque()  # by first layer, what STEP has not waited for

    def warm_up(self) -> None:
        """Make each kind of copy once, to no block or slot: compiling its kernel would hold up a step for a second."""
        self._streams.wait(Stream.SWAP, self._streams.record(Stream.STEP))  # Which may be using this memory still.
        no_rows = self._streams.upload(np.zeros(1, np.int64))

        def from_listed(source: Tensor, target: Tensor) -> None:
            self._streams.run(Stream.SWAP, partial(self._copy_rows, source, target, 0, sources=no_rows))

        def to_listed(source: Tensor, target: Tensor) -> None:
            self._streams.run(Stream.SWAP, partial(self._copy_rows, source, target, 0, targets=no_rows))

        for span in [*self._whole, *(span for _, spans in self._parts for span in spans)]:
            self._fork(span, _Moves(_NONE, _NONE, no_rows, no_rows))
            if span.slots is None:
                continue
            to_listed(self._records(span, self._trays[0].memory, 1), span.slots)
            if span.codec is None:
                from_listed(span.blocks, self._records(span, self._trays[0].memory, 1))
                self._load_exactly(span, _Moves(_NONE, _NONE, no_rows, no_rows))
            else:
                records, raw = self._records(span, self._encoded, 1), self._raw_rows(span, 1)
                from_listed(span.slots, records)
                from_listed(span.blocks, raw)
                to_listed(raw, span.blocks)
                blocks = raw.view(span.codec.dtype).view(1, *span.codec.shape)
                self._streams.run(Stream.SWAP, partial(span.codec.encode, blocks, out=records.view(torch.uint8)))
                self._streams.run(Stream.SWAP, partial(span.codec.decode, records.view(torch.uint8), out=blocks))

    def apply(self, transfers: Iterable[Transfer]) -> Callable[[], None]:
        """Issue copies; see `KVPools.apply`."""
        rounds = {
            group: [self._upload(round) for round in of_group] for group, of_group in in_rounds(transfers).items()
        }
        self._streams.wait(Stream.SWAP, self._streams.record(Stream.STEP))
        self._arriving.clear()  # What comes on SWAP from now on comes after all of that.
        for first_layer, spans in self._parts if self._large(rounds) else [(0, self._whole)]:
            for span in spans:
                for spills, forks, loads in rounds.get(span.group, ()):
                    if spills.count:
                        self._spill(span, spills)
                    if forks.count:
                        self._fork(span, forks)
                    if loads.count:
                        self._load(span, loads)
            self._arriving.append((first_layer, self._streams.record(Stream.SWAP)))
        loaded = self._streams.record(Stream.SWAP, for_threads=True)
        drained = self._streams.record(Stream.DRAIN, for_threads=True)

        def written() -> None:
            loaded.synchronize()
            drained.synchronize()

        return written

    def wait(self, layer: int | None) -> None:
        """Have STEP wait for a layer's part, or all; see `KVPools.wait`."""
        while self._arriving and (layer is None or self._arriving[0][0] <= layer):
            _, event = self._arriving.popleft()
            self._streams.wait(Stream.STEP, event)

    def _spans(
        self,
        part: Part,
        pools: Mapping[LayerGroup, Tensor],
        slots: Mapping[LayerGroup, Tensor],
        codecs: Mapping[LayerGroup, Codec],
    ) -> list[_Span]:
        spans = []
        for group, layers in part.spans.items():
            of_slots, codec = slots.get(group), codecs.get(group)
            if codec is not None:
                codec = make_codec(codec.name, (len(layers), *codec.shape[1:]), codec.dtype)
            blocks = pools[group].flatten(1).view(torch.uint8)
            spans.append(
                _Span(
                    group=group,
                    blocks=self._columns(group, blocks, layers),
                    slots=None if of_slots is None else self._columns(group, of_slots, layers),
                    codec=codec,
                )
            )
        return spans

    def _columns(self, group: LayerGroup, rows: Tensor, layers: range) -> Tensor:
        """The part of uint8 rows [n, bytes of all layers] that holds these layers, in the largest words that fit."""
        size = rows.shape[1] // self._layout.layers_in[group]
        words = rows.view(_word(size))
        size //= words.itemsize
        return words[:, layers.start * size : layers.stop * size]

    def _upload(self, round: Round) -> tuple[_Moves, _Moves, _Moves]:
        routes = (round.spills, round.forks, round.loads)
        sides = [np.array(side, np.int64) for pairs in routes for side in (pairs.sources, pairs.targets)]
        uploaded = self._streams.upload(np.concatenate(sides)).split_with_sizes([len(side) for side in sides])

        def moves_of(n: int) -> _Moves:
            return _Moves(sides[n], sides[n + 1], uploaded[n], uploaded[n + 1])

        return moves_of(0), moves_of(2), moves_of(4)

    def _large(self, rounds: Mapping[LayerGroup, Sequence[tuple[_Moves, _Moves, _Moves]]]) -> bool:
        """Whether the list is worth being made part by part."""
        up = down = 0
        for span in self._whole:
            for spills, _, loads in rounds.get(span.group, ()):
                if span.slots is not None:
                    up += loads.count * span.record_bytes
                    down += spills.count * span.record_bytes
        return up >= self._large_bytes or down > self._staged * len(self._trays)

    def _spill(self, span: _Span, moves: _Moves) -> None:
        assert span.slots is not None, "spilled to a host tier that is not there"
        streams = self._streams
        for batch in moves.batches(self._staged // span.record_bytes):
            tray = self._trays[0]
            self._trays.rotate(-1)
            if tray.emptied is not None:
                streams.wait(Stream.SWAP, tray.emptied)
            records = self._records(span, tray.memory, batch.count)
            streams.run(Stream.SWAP, partial(self._encode, span, batch, records))
            streams.wait(Stream.DRAIN, streams.record(Stream.SWAP))
            streams.run(Stream.DRAIN, partial(self._cross, records, span.slots, batch, targets=True))
            tray.emptied = streams.record(Stream.DRAIN)
            self._spills += 1
            self._spilled[span.group][batch.targets] = self._spills
            self._draining.append((self._spills, tray.emptied))

    def _fork(self, span: _Span, moves: _Moves) -> None:
        blocks, sources, targets = span.blocks, moves.device_sources, moves.device_targets
        copy = partial(self._copy_rows, blocks, blocks, moves.count, sources=sources, targets=targets)
        self._streams.run(Stream.SWAP, copy)

    def _load(self, span: _Span, moves: _Moves) -> None:
        assert span.slots is not None, "loaded from a host tier that is not there"
        self._load_after(int(self._spilled[span.group][moves.sources].max()))
        if span.codec is None:
            self._load_exactly(span, moves)
            return
        for batch in moves.batches(self._staged // span.record_bytes):
            self._streams.run(Stream.SWAP, partial(self._decode, span, batch))

    def _load_exactly(self, span: _Span, moves: _Moves) -> None:
        assert span.slots is not None
        self._streams.run(Stream.SWAP, partial(self._cross, span.slots, span.blocks, moves, sources=True, targets=True))

    def _load_after(self, number: int) -> None:
        """Have SWAP wait for the batch of spills of that number, or one soon after; 0 is none."""
        if number > self._loads_after:
            self._loads_after, event = next(drained for drained in self._draining if drained[0] >= number)
            self._streams.wait(Stream.SWAP, event)

    def _cross(
        self, source: Tensor, target: Tensor, moves: _Moves, *, sources: bool = False, targets: bool = False
    ) -> None:
        """On SWAP or DRAIN: rows over PCIe, the moves' ones of `source` and of `target`, or 0, 1, 2, ..."""
        if source.shape[1] * source.itemsize < self._engine_bytes:
            from_, to = moves.device_sources if sources else None, moves.device_targets if targets else None
            self._copy_rows(source, target, moves.count, sources=from_, targets=to)
            return
        rows = range(moves.count)
        from_rows, to_rows = moves.sources.tolist() if sources else rows, moves.targets.tolist() if targets else rows
        for from_row, to_row in zip(from_rows, to_rows, strict=True):
            target[to_row].copy_(source[from_row], non_blocking=True)

    def _encode(self, span: _Span, batch: _Moves, records: Tensor) -> None:
        """On SWAP: blocks to records."""
        if span.codec is None:
            self._copy_rows(span.blocks, records, batch.count, sources=batch.device_sources)
            return
        raw = self._raw_rows(span, batch.count)
        self._copy_rows(span.blocks, raw, batch.count, sources=batch.device_sources)
        blocks = raw.view(span.codec.dtype).view(batch.count, *span.codec.shape)
        span.codec.encode(blocks, out=records.view(torch.uint8))

    def _decode(self, span: _Span, batch: _Moves) -> None:
        """On SWAP: records in slots to blocks."""
        assert span.slots is not None
        assert span.codec is not None
        records, raw = self._records(span, self._encoded, batch.count), self._raw_rows(span, batch.count)
        self._cross(span.slots, records, batch, sources=True)
        blocks = raw.view(span.codec.dtype).view(batch.count, *span.codec.shape)
        span.codec.decode(records.view(torch.uint8), out=blocks)
        self._copy_rows(raw, span.blocks, batch.count, targets=batch.device_targets)

    def _records(self, span: _Span, memory: Tensor, count: int) -> Tensor:
        """The first records in such memory, as rows of the words that slots are seen as."""
        assert span.slots is not None
        return memory[: count * span.record_bytes].view(span.slots.dtype).view(count, -1)

    def _raw_rows(self, span: _Span, count: int) -> Tensor:
        return self._raw[: count * span.block_bytes].view(span.blocks.dtype).view(count, -1)


def _word(size: int) -> torch.dtype:
    """The widest type of which `size` bytes are a whole number."""
    return next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % dtype.itemsize == 0)
