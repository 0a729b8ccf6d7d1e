"""Whether engines fit on a card beside all else, by arithmetic, before any memory is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import SegmentKind
from wicore_backend.executor.tensorrt.card import Card
from wicore_backend.executor.tensorrt.records import EngineRecord
from wicore_backend.executor.tensorrt.store import EngineSet


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of device memory.

    Attributes
    ----------
    weights
        Of all engines.
    activations
        Of the decoder's engines, which share them.
    vision
        Of the vision tower's activations, which computes beside the decoder.
    buffers
        What goes from one segment to the next.
    reserved
        For what else the caller wants to have.
    kv_cache
        For the KV cache; None leaves it what remains, which is nothing where weights are streamed.
    free
        Of the card's, now.
    """

    weights: int
    activations: int
    vision: int
    buffers: int
    reserved: int
    kv_cache: int | None
    free: int

    @property
    def without_weights(self) -> int:
        """All that is needed, but the weights."""
        return self.activations + self.vision + self.buffers + self.reserved + (self.kv_cache or 0)

    @property
    def streaming_budget(self) -> int | None:
        """Of the weights, those bytes that fit; None if all do."""
        left = self.free - self.without_weights
        return None if left >= self.weights else max(0, left)

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("activations", self.activations),
            ("vision tower", self.vision),
            ("buffers", self.buffers),
            ("the rest", self.reserved),
            ("KV cache", self.kv_cache),
        )
        summed = " + ".join(f"{name} {_gib(size)}" for name, size in parts if size)
        return f"{summed} = {_gib(self.weights + self.without_weights)}, and {_gib(self.free)} are free"


def room_for(engines: EngineSet, card: Card, *, buffers: int, reserved: int, kv_cache: int | None) -> Room:
    """What `engines` need on `card`, by what is known of them since they were built."""
    vision = [record for record in engines.records if SegmentKind.VISION in record.segments]
    decoder = [record for record in engines.records if SegmentKind.VISION not in record.segments]
    return Room(
        weights=sum(record.report.weight_bytes for record in engines.records),
        activations=_most_activations(decoder),
        vision=_most_activations(vision),
        buffers=buffers,
        reserved=reserved,
        kv_cache=kv_cache,
        free=card.free_bytes(),
    )


def check_room(room: Room, engines: EngineSet, card: Card) -> None:
    """Refuse what does not fit, and cannot be streamed either; and weights that would stream into all that is free.

    Raises
    ------
    ExecutorError
        With the arithmetic, and what can be done.
    """
    budget = room.streaming_budget
    if budget is None:
        return
    if budget > 0 and engines.key.weight_streaming:
        if room.kv_cache is None:
            raise ExecutorError(
                f"weights are streamed on {card.name}, where they would take all that is free and leave no KV cache: "
                f"{room}; set kv_cache_bytes, below the {_gib(budget)} that the weights on the card share with it"
            )
        return
    raise ExecutorError(
        f"too little memory on {card.name} for {engines.key.precision} engines: {room}. Build them in a smaller "
        "precision (--precision int4), or with --weight-streaming, which keeps a part of the weights in host memory; "
        "or lower kv_cache_bytes or max_batch_tokens"
    )


def _most_activations(records: Sequence[EngineRecord]) -> int:
    return max((size for record in records for size in record.report.activation_bytes), default=0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
