"""Steps of decodes as CUDA graphs: launched at once, in place of hundreds of kernels one by one.

A step of decodes alone runs the same kernels whatever its sequences are, so long as there are as many of them. It is
recorded once for each of a few numbers, over memory that stays where it is; a step of fewer sequences is padded to the
next number. What differs between steps, tokens, positions and block tables, is copied there before the replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.engine.recording import Record, Recorded, Sizes
from wicore_backend.engine.runner import StepOutput, run_layers, when_done
from wicore_backend.executor.base import Executor
from wicore_backend.executor.upload import to_device
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.models.gemma3.rope import RotaryTables


class Bucket(Protocol):
    """Memory for the plans of whatever steps of decodes fit."""

    @property
    def plan(self) -> Any: ...


class BucketAttention(Attention[Any], Protocol):
    """Attention whose plans can stay where they are, as `GpuPagedAttention`'s."""

    def decode_bucket(self, *, sequences: int, max_keys: int, measures: bool = True) -> Any:
        """A `Bucket` for steps of up to `sequences` decodes of up to `max_keys` keys.

        What `attend` does with its plan is the same work at each step; rows that a step does not have are left alone.
        """

    def refresh(self, bucket: Any, step: PackedStep) -> Any:
        """Make the bucket's plan that of `step`, and return it; nobody waits for the device."""


class Results(NamedTuple):
    """What a recorded step leaves: hidden states and attention before the end of the last layer, and the logits."""

    hidden: Tensor
    attention: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    bucket: Bucket
    ids: Tensor
    """int64 [sequences], the tokens; ..."""
    positions: Tensor
    """... int32 [sequences], where they are."""
    replay: Recorded[Results]


class DecodeGraphs:
    """`DecodeReplay` by CUDA graphs, of the numbers of sequences that have been prepared.

    To be used under `torch.inference_mode()`, on one thread and stream.

    Parameters
    ----------
    max_sequences, max_keys
        Of a step; and of a sequence, its newest token's key included.
    measures
        Whether attention mass may be asked of steps.
    record
        Makes a step's work repeatable.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        attention: BucketAttention,
        rotary: RotaryTables,
        layout: KVLayout,
        max_sequences: int,
        max_keys: int,
        measures: bool,
        record: Record,
    ) -> None:
        self._executor = executor
        self._attention = attention
        self._rotary = rotary
        self._layout = layout
        self._max_keys = max_keys
        self._measures = measures
        self._record = record
        self._wanted = bucket_sizes(max_sequences)
        self._graphs: Sizes[_Graph] = Sizes()

    def prepare(self) -> None:
        """Record steps of all sizes: see `Sizes.prepare`."""
        self._graphs.prepare(self._wanted, self._prepared, "decodes")

    def run(self, step: PackedStep, ids: Tensor) -> StepOutput | None:
        """What `step`, of decodes alone, gives for the tokens `ids` int64 [T]; None if it fits none that is prepared.

        Its logits are good until the next one.
        """
        count = len(ids)
        graph = self._graphs.fitting(count)
        if graph is None or int(step.positions.max()) >= self._max_keys:
            return None
        plan = self._fill(graph, step, ids)
        results = graph.replay()
        return StepOutput(
            self._executor,
            *(results.hidden, results.attention),
            offsets=tuple(range(count + 1)),
            mass=self._attention.collect(plan),
            **when_done(self._executor.device)._asdict(),
            computed=results.logits,
        )

    def _fill(self, graph: _Graph, step: PackedStep, ids: Tensor) -> Any:
        """Give the graph a step; rows past it keep the tokens that were there, and write nothing."""
        graph.ids[: len(ids)].copy_(ids)
        graph.positions[: len(ids)].copy_(to_device(step.positions, ids.device))
        return self._attention.refresh(graph.bucket, step)

    def _prepared(self, size: int) -> _Graph:
        """The graph for `size` sequences, recorded without any: none of its rows touches the pools."""
        executor, attention, rotary, layers = self._executor, self._attention, self._rotary, self._layout.layers
        bucket = attention.decode_bucket(sequences=size, max_keys=self._max_keys, measures=self._measures)
        tokens = torch.zeros(size, dtype=torch.int64, device=executor.device)
        positions = torch.zeros(size, dtype=torch.int32, device=executor.device)
        rows = torch.arange(size, device=executor.device)

        def work() -> Results:
            hidden = executor.embed(tokens, None, None)
            rope = rotary.lookup(positions)
            hidden, attended = run_layers(executor, attention, bucket.plan, layers, hidden, rope)
            return Results(hidden, attended, executor.last(hidden, attended, rows))

        work()
        recorded = self._record(work)
        recorded.lend()
        return _Graph(bucket, tokens, positions, recorded)


def bucket_sizes(max_sequences: int) -> Sequence[int]:
    """Numbers of sequences to record, rising: powers of two, with others between where those are far apart."""
    sizes = {1, 2, 4, 8, 16, 24, 32, 48, *range(64, max_sequences, 32)}
    return sorted({size for size in sizes if size < max_sequences} | {max_sequences})
