"""Steps of decodes as CUDA graphs: launched at once, in place of hundreds of kernels one by one.

A step of decodes alone runs the same kernels whatever its sequences are, so long as there are as many of them. It is
captured once for each of a few numbers, over memory that stays where it is; a step of fewer sequences is padded to the
next number. What differs between steps, tokens, positions and block tables, is copied there before the replay.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.engine.runner import StepOutput, run_layers, when_done
from wicore_backend.executor.base import Executor
from wicore_backend.executor.upload import to_device
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.models.gemma3.rope import RotaryTables

_log = logging.getLogger(__name__)


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

    def collect(self, plan: Any) -> Callable[[], Mapping[int, NDArray[np.float32]]]:
        """`mass` of the plan as it is now; it is waited for when the result is called."""


class Results(NamedTuple):
    """What a captured step leaves: hidden states and attention before the end of the last layer, and the logits."""

    hidden: Tensor
    attention: Tensor
    logits: Tensor


Work = Callable[[], Results]


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A CUDA graph, to be called."""

    graph: torch.cuda.CUDAGraph
    results: Results
    work: Work
    """What was captured: it keeps the tensors whose memory the graph reads."""

    def __call__(self) -> Results:
        self.graph.replay()
        return self.results


def capture(work: Work) -> Work:
    """`work` as a CUDA graph: the same kernels over the same memory, that of the results included, at each call.

    What it compiles and allocates once, a call before must have done.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        # Other threads may use the device meanwhile, to move blocks between the tiers; that is no part of the graph.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = work()
    except BaseException:
        torch.cuda.set_stream(stream)  # PyTorch stays on the stream of a capture that cannot be ended.
        raise
    return _Captured(graph, results, work)


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    bucket: Bucket
    ids: Tensor
    """int64 [sequences], the tokens; ..."""
    positions: Tensor
    """... int32 [sequences], where they are."""
    replay: Work


class DecodeGraphs:
    """`DecodeReplay` by CUDA graphs. Each is captured when a step first needs it, which takes that one about a second.

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
        record: Callable[[Work], Work] = capture,
    ) -> None:
        self._executor = executor
        self._attention = attention
        self._rotary = rotary
        self._layout = layout
        self._max_keys = max_keys
        self._measures = measures
        self._record = record
        self._sizes = bucket_sizes(max_sequences)
        self._graphs: dict[int, _Graph | None] = {}

    def run(self, step: PackedStep, ids: Tensor) -> StepOutput | None:
        """What `step`, of decodes alone, gives for the tokens `ids` int64 [T]; None if there is no graph for it.

        Such is one that is larger than any, and one whose graph could not be had, for lack of memory for example.
        """
        count = len(ids)
        if count > self._sizes[-1] or int(step.positions.max()) >= self._max_keys:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        if size not in self._graphs:
            self._graphs[size] = self._prepared(size, step, ids)
        graph = self._graphs[size]
        if graph is None:
            return None
        plan = self._fill(graph, step, ids)
        results = graph.replay()
        return StepOutput(
            self._executor,
            *(results.hidden, results.attention),
            offsets=tuple(range(count + 1)),
            mass=self._attention.collect(plan),
            done=when_done(self._executor.device),
            computed=results.logits,
        )

    def _fill(self, graph: _Graph, step: PackedStep, ids: Tensor) -> Any:
        """Give the graph a step; rows past it keep the tokens that were there, and write nothing."""
        graph.ids[: len(ids)].copy_(ids)
        graph.positions[: len(ids)].copy_(to_device(step.positions, ids.device))
        return self._attention.refresh(graph.bucket, step)

    def _prepared(self, size: int, step: PackedStep, ids: Tensor) -> _Graph | None:
        """The graph for `size` sequences, if it can be had."""
        try:
            return self._prepare(size, step, ids)
        except Exception:
            _log.exception("steps of %d decodes cannot be captured; they are run layer by layer from now on", size)
            return None

    def _prepare(self, size: int, step: PackedStep, ids: Tensor) -> _Graph:
        """The graph for `size` sequences. It is run with `step` first, which does no harm: it will be run again."""
        executor, attention, rotary, layers = self._executor, self._attention, self._rotary, self._layout.layers
        bucket = attention.decode_bucket(sequences=size, max_keys=self._max_keys, measures=self._measures)
        tokens = torch.zeros(size, dtype=torch.int64, device=ids.device)
        positions = torch.zeros(size, dtype=torch.int32, device=ids.device)
        rows = torch.arange(size, device=ids.device)

        def work() -> Results:
            hidden = executor.embed(tokens, None, None)
            rope = rotary.lookup(positions)
            hidden, attended = run_layers(executor, attention, bucket.plan, layers, hidden, rope)
            return Results(hidden, attended, executor.last(hidden, attended, rows))

        self._fill(_Graph(bucket, tokens, positions, work), step, ids)
        work()
        return _Graph(bucket, tokens, positions, self._record(work))


def bucket_sizes(max_sequences: int) -> Sequence[int]:
    """Numbers of sequences to capture, rising: powers of two, with others between where those are far apart."""
    sizes = {1, 2, 4, 8, 16, 24, 32, 48, *range(64, max_sequences, 32)}
    return sorted({size for size in sizes if size < max_sequences} | {max_sequences})
