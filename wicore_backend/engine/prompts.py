"""A prompt by itself as one CUDA graph: nothing between its kernels, which is what its first token waits for.

Beside decodes, or other prompts, a step's attention is other work each time (`engine/segments.py`). That of one
prompt is always the same tiles of queries, with more or fewer keys; where these are many, they are shared out among
programs, and the step is not for a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep
from wicore_backend.engine.graphs import Bucket
from wicore_backend.engine.recording import Record, Recorded, Sizes
from wicore_backend.engine.runner import Attended, run_layers
from wicore_backend.engine.segments import token_counts
from wicore_backend.engine.step_inputs import StepInputs
from wicore_backend.executor.base import Executor
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.models.gemma3.rope import RotaryTables

_KEYS = 2048
"""Of a sequence. More keys are shared out among programs, or come with so many tokens that no graph is needed."""


def prompt_keys(max_keys: int) -> int:
    """Keys of the longest sequence that is recorded, of a model whose sequences have up to `max_keys`."""
    return min(max_keys, _KEYS)


class PromptAttention(Attention[Any], Protocol):
    """Attention whose plans for a prompt can stay where they are, as `GpuPagedAttention`'s."""

    def prompt_bucket(self, *, max_keys: int, out: Tensor, measures: bool = True) -> Any:
        """A `Bucket` for a prompt by itself of up to as many tokens as `out` has rows; `attend` returns that."""

    def refresh_prompt(self, bucket: Any, step: PackedStep) -> Any:
        """Make the bucket's plan that of `step`, and return it; nobody waits for the device.

        Raises
        ------
        ValueError
            If the step does not fit.
        """


class Results(NamedTuple):
    """What a recorded prompt leaves: hidden states and attention before the end of the last layer."""

    hidden: Tensor
    attention: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    bucket: Bucket
    replay: Recorded[Results]


class PromptGraphs:
    """`LayersReplay` of a prompt by itself, by CUDA graphs of the numbers of tokens that have been prepared.

    To be used under `torch.inference_mode()`, on one thread and stream.

    Parameters
    ----------
    inputs
        Of the longest step that is recorded.
    max_keys
        Of a sequence.
    measures
        Whether attention mass may be asked of steps.
    record
        Makes a step's work repeatable.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        attention: PromptAttention,
        rotary: RotaryTables,
        layout: KVLayout,
        inputs: StepInputs,
        max_keys: int,
        measures: bool,
        record: Record,
    ) -> None:
        self._executor = executor
        self._attention = attention
        self._rotary = rotary
        self._layout = layout
        self._max_keys = prompt_keys(max_keys)
        self._measures = measures
        self._record = record
        self._inputs = inputs
        self._graphs: Sizes[_Graph] = Sizes()

    def prepare(self) -> None:
        """Record prompts of all sizes: see `Sizes.prepare`."""
        self._graphs.prepare(token_counts(len(self._inputs)), self._prepared, "prompts")

    def run(self, step: PackedStep, hidden: Tensor, arrive: Callable[[int | None], None]) -> Attended | None:
        """What the layers make of the embeddings `hidden` [T, D] of a step; None if it fits none that is prepared.

        The results are good until the next step. `arrive` is called with None before all.
        """
        count = len(hidden)
        graph = self._graphs.fitting(count)
        if step.decodes or len(step.query_lens) > 1 or graph is None:
            return None
        try:
            plan = self._attention.refresh_prompt(graph.bucket, step)
        except ValueError:  # Too many keys.
            return None
        arrive(None)
        self._inputs.fill(hidden, step.positions)
        results = graph.replay()
        return Attended(plan, results.hidden[:count], results.attention[:count])

    def _prepared(self, size: int) -> _Graph:
        """The graph for `size` tokens, recorded without any: none of its rows touches the pools."""
        executor, attention, rotary, layers = self._executor, self._attention, self._rotary, self._layout.layers
        inputs = self._inputs.first(size)
        bucket = attention.prompt_bucket(max_keys=self._max_keys, out=inputs.attended, measures=self._measures)

        def work() -> Results:
            rope = rotary.lookup(inputs.positions)
            return Results(*run_layers(executor, attention, bucket.plan, layers, inputs.embedded, rope))

        work()
        recorded = self._record(work)
        recorded.lend()
        return _Graph(bucket, recorded)
