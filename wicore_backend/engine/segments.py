"""Steps with prompts as CUDA graphs, one for each dense segment between two attentions.

The dense segments of a step run the same kernels whatever its sequences are, so long as it has as many tokens. They are
recorded once for each of a few numbers of tokens, and a step is padded to the next; attention, whose work depends on
the sequences, is launched in between. A short prompt's kernels end sooner than a host launches them one by one; of long
steps the device is the slower part, and they are left as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.engine.recording import Record, Recorded, Sizes
from wicore_backend.engine.runner import Attended
from wicore_backend.engine.step_inputs import StepInputs
from wicore_backend.executor.base import Executor
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.models.gemma3.rope import RotaryTables

_log = logging.getLogger(__name__)

MOST_TOKENS = 1024
"""On an H200, twice the tokens whose kernels take as long as launching them one by one did."""


class PlacingAttention(Attention[Any], Protocol):
    """Attention that puts its results where it is told, as `GpuPagedAttention`."""

    def plan(self, step: PackedStep, *, out: Tensor | None = None) -> Any:
        """As ever; `attend` returns the first rows of `out` if that is given."""


class Between(NamedTuple):
    """What a segment leaves to the next one, and to the attention before it."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


class _Walk:
    """The segments of a step one after the other, all but the end of the last layer.

    Each may be called any number of times before the next, as who records it may try it first.

    Parameters
    ----------
    inputs
        Of T tokens; all but the first segment read the attention in it.
    """

    def __init__(self, executor: Executor, rotary: RotaryTables, layout: KVLayout, inputs: StepInputs) -> None:
        self._executor = executor
        self._rotary = rotary
        self._groups = [group for group, _ in layout.layers]
        self._inputs = inputs
        self._rope: Mapping[LayerGroup, tuple[Tensor, Tensor]] = {}
        self._hidden = [inputs.embedded] * 2  # A layer reads one and leaves the other.

    def segments(self) -> Iterator[Callable[[], Between]]:
        """To be called in this order, each after the attention of the layer that the one before it begins."""
        yield self._first
        for layer in range(len(self._groups) - 1):
            yield partial(self._mid, layer)

    def _first(self) -> Between:
        self._rope = self._rotary.lookup(self._inputs.positions)
        self.let_go()
        hidden = self._inputs.embedded
        return Between(hidden, *self._executor.first(hidden, *self._rope[self._groups[0]]))

    def _mid(self, layer: int) -> Between:
        rope, before, after = self._rope[self._groups[layer + 1]], layer % 2, (layer + 1) % 2
        self._hidden[after] = self._inputs.embedded  # So that what it leaves may be where that was.
        hidden, qkv = self._executor.mid(layer, self._hidden[before], self._inputs.attended, *rope)
        self._hidden[after] = hidden
        return Between(hidden, *qkv)

    def let_go(self) -> None:
        """Keep no hidden states: their memory is others'."""
        self._hidden[:] = [self._inputs.embedded] * 2


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """Memory for the inputs of steps of so many tokens, and their segments over it."""

    inputs: StepInputs
    segments: Sequence[Recorded[Between]]


class SegmentGraphs:
    """`LayersReplay` by CUDA graphs, of the numbers of tokens that have been prepared.

    To be used under `torch.inference_mode()`, on one thread and stream.

    Parameters
    ----------
    inputs
        Of the longest step that is recorded.
    record
        Makes a segment's work repeatable.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        attention: PlacingAttention,
        rotary: RotaryTables,
        layout: KVLayout,
        inputs: StepInputs,
        record: Record,
    ) -> None:
        self._executor = executor
        self._attention = attention
        self._rotary = rotary
        self._layout = layout
        self._record = record
        self._inputs = inputs
        self._buckets: Sizes[_Bucket] = Sizes()

    def prepare(self) -> None:
        """Record steps of all sizes: see `Sizes.prepare`."""
        self._buckets.prepare(token_counts(len(self._inputs)), self._prepared, "tokens")

    def run(self, step: PackedStep, hidden: Tensor, arrive: Callable[[int | None], None]) -> Attended | None:
        """What the layers make of the embeddings `hidden` [T, D] of a step; None if it fits none that is prepared.

        The results are good until the next step. `arrive` is called with each layer before its attention.
        """
        count = len(hidden)
        bucket = self._buckets.fitting(count)
        if bucket is None:
            return None
        bucket.inputs.fill(hidden, step.positions)
        between = bucket.segments[0]()
        plan = self._attention.plan(step, out=bucket.inputs.attended)  # While the device is at it.
        for layer, segment in enumerate(bucket.segments[1:]):
            arrive(layer)
            self._attend(plan, layer, between, count)
            between = segment()
        last = len(bucket.segments) - 1
        arrive(last)
        attended = self._attend(plan, last, between, count)
        return Attended(plan, between.hidden[:count], attended)

    def rehearse(self, tokens: int) -> None:
        """Run the segments of a longer step once, so that no request waits until their kernels are compiled.

        They touch no pool. What they take of the device's memory such a step takes as well.
        """
        if tokens <= len(self._inputs):
            return
        try:
            for segment in islice(self._walk(self._inputs.like(tokens)).segments(), 2):
                segment()
        except Exception:
            _log.exception("a step of %d tokens cannot be rehearsed; the first one will show why", tokens)
            return
        _log.info("steps of up to %d tokens have been rehearsed", tokens)

    def _attend(self, plan: Any, layer: int, between: Between, count: int) -> Tensor:
        return self._attention.attend(plan, layer, between.q[:count], between.k[:count], between.v[:count])

    def _walk(self, inputs: StepInputs) -> _Walk:
        return _Walk(self._executor, self._rotary, self._layout, inputs)

    def _prepared(self, size: int) -> _Bucket:
        """The segments for `size` tokens; they touch no pool."""
        inputs = self._inputs.first(size)
        walk = self._walk(inputs)
        for segment in walk.segments():
            segment()
        recorded = []
        for segment in walk.segments():
            recorded.append(self._record(segment))
            recorded[-1].lend()  # The hidden state, which the next one reads, is the walk's as well.
        walk.let_go()
        return _Bucket(inputs, recorded)


def token_counts(max_tokens: int) -> Sequence[int]:
    """Numbers of tokens to record, rising: tiles of the products are of 128 rows; what is less reads as much."""
    most = min(max_tokens, MOST_TOKENS)
    sizes = {16, 32, 64, *range(128, most, 128)}
    return sorted({size for size in sizes if size < most} | {most})
