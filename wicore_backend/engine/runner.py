"""Runs the chunks of one step through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import Attention, PackedStep, PlanT
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.engine.pictures import Picture, PictureEncoder
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Request
from wicore_backend.executor.base import Executor
from wicore_backend.executor.upload import to_device
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.models.gemma3.rope import RotaryTables


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """The model's output for the T packed tokens of a step, short of the head, which runs on the rows asked for.

    The rows are those of the decodes, one each, then those of the chunks.
    """

    executor: Executor
    hidden: Tensor
    attention: Tensor
    offsets: tuple[int, ...]
    """Row of each decode's and each chunk's first token, and T."""
    mass: Callable[[], Mapping[int, NDArray[np.float32]]] = dict
    """The attention masses [blocks] measured in this step, by number of the decode, or of decodes plus that of the
    chunk: see `Attention.mass`. It waits for the device, so call it when the step's tokens are there."""
    done: Callable[[], None] = lambda: None
    """Waits until the device has computed the step, though not for what it was given later; ..."""
    over: Callable[[], bool] = lambda: True
    """... and whether it has."""
    computed: Tensor | None = None
    """The logits of the step's rows, where they come with it; the next such step overwrites them."""

    def logits(self, rows: Rows[int]) -> Tensor:
        """float32 [R, V] of the given rows."""
        if self.computed is not None and list(rows) == list(range(len(rows))):
            return self.computed[: len(rows)]
        index = to_device(np.array(rows, np.int64), self.hidden.device)
        return self.executor.last(self.hidden, self.attention, index)


class DecodeReplay(Protocol):
    """A quicker way to run steps of decodes alone: see `engine/graphs.py`."""

    def run(self, step: PackedStep, ids: Tensor) -> StepOutput | None:
        """What `step` gives for the tokens `ids` int64 [T]; None for a step that has to be run otherwise."""


class Attended(NamedTuple):
    """A step up to the last layer's attention."""

    plan: Any
    """The attention's."""
    hidden: Tensor
    """[T, D], before the end of the last layer."""
    attention: Tensor
    """[T, query heads * d], the last layer's."""


class LayersReplay(Protocol):
    """A quicker way through the layers of steps of few tokens: see `engine/prompts.py` and `engine/segments.py`."""

    def run(self, step: PackedStep, hidden: Tensor, arrive: Callable[[int | None], None]) -> Attended | None:
        """What the layers make of the embeddings `hidden` [T, D]; None for a step that has to be run otherwise.

        `arrive` is called with each layer before its attention, or with None before all.
        """


def run_layers(
    executor: Executor,
    attention: Attention[PlanT],
    work: PlanT,
    layers: Rows[tuple[LayerGroup, int]],
    hidden: Tensor,
    rope: Mapping[LayerGroup, tuple[Tensor, Tensor]],
    arrive: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] before the end of the last layer, and its attention [T, query heads * d].

    `hidden` are the embeddings, `rope` the cosines and sines of the tokens' positions. `arrive` is called with each
    layer before its attention.
    """
    q, k, v = executor.first(hidden, *rope[layers[0][0]])
    for layer, (_, (next_group, _)) in enumerate(pairwise(layers)):
        arrive(layer)
        attended = attention.attend(work, layer, q, k, v)
        hidden, (q, k, v) = executor.mid(layer, hidden, attended, *rope[next_group])
    arrive(len(layers) - 1)
    return hidden, attention.attend(work, len(layers) - 1, q, k, v)


class ModelRunner:
    """Packs chunks, has their images encoded and drives the executor and the attention layer by layer.

    To be used under `torch.inference_mode()`.

    Parameters
    ----------
    sampling
        Whose attention mass to measure, and when; None measures none. May be changed between steps.
    arrive
        Called before each layer's attention, or with None before all: its blocks may still be on their way
        (`KVPools.wait`).
    replay
        What runs the steps of decodes alone that it can; ...
    layers
        ... and of the others those that they can, asked in turn.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        attention: Attention[Any],
        rotary: RotaryTables,
        pictures: PictureEncoder,
        layout: KVLayout,
        sampling: MassSampling | None = None,
        arrive: Callable[[int | None], None] = lambda _: None,
        replay: DecodeReplay | None = None,
        layers: Rows[LayersReplay] = (),
    ) -> None:
        self._executor = executor
        self._attention = attention
        self._rotary = rotary
        self._pictures = pictures
        self._layout = layout
        self.sampling = sampling
        self._arrive = arrive
        self._replay = replay
        self._layers = layers

    def run(self, plan: StepPlan, ahead: Tensor | None = None) -> StepOutput:
        """Compute a step, whose blocks are in place, and write its keys and values to the pools.

        Running the same plan again computes and writes the same.

        Parameters
        ----------
        ahead
            int64 [R] on the device: the tokens of the decodes whose `Sequence.ahead` is a row of it.
        """
        executor = self._executor
        chunks = plan.parts
        # Several tokens of a sequence are a piece of prompt to attention, which sees them one after the other.
        decodes = 0 if plan.guesses else len(plan.decodes)
        step = self._pack(chunks, decodes=decodes, measured=self._measured(plan))
        ids = self._ids(plan, ahead)
        if self._replay is not None and not plan.chunks and not plan.guesses:
            self._arrive(None)
            output = self._replay.run(step, ids)
            if output is not None:
                return output
        offsets = np.concatenate([[0], step.query_lens.cumsum()]).tolist()
        hidden = executor.embed(ids, *self._soft_tokens(chunks, offsets))
        replays = (replay.run(step, hidden, self._arrive) for replay in self._layers)
        attended = next((replayed for replayed in replays if replayed is not None), None)
        if attended is None:
            attended = self._run_layers(step, hidden)
        mass, done = self._attention.collect(attended.plan), when_done(executor.device)
        return StepOutput(executor, attended.hidden, attended.attention, tuple(offsets), mass, *done)

    def _run_layers(self, step: PackedStep, hidden: Tensor) -> Attended:
        work = self._attention.plan(step)
        rope = self._rotary.lookup(to_device(step.positions, hidden.device))
        layers, arrive = self._layout.layers, self._arrive
        return Attended(work, *run_layers(self._executor, self._attention, work, layers, hidden, rope, arrive))

    def _ids(self, plan: StepPlan, ahead: Tensor | None) -> Tensor:
        """int64 [T], the step's tokens."""
        if plan.guesses:  # Nobody's token is on the device alone: they were told before the guesses were made.
            tokens = ((s.tokens[-1], *plan.guesses.get(s, ())) for s in plan.decodes)
            return to_device(np.fromiter(chain.from_iterable(tokens), np.int64), self._executor.device)
        decodes = (s.tokens[-1] if s.ahead is None else 0 for s in plan.decodes)
        chunks = chain.from_iterable(c.sequence.tokens[c.start : c.end] for c in plan.chunks)
        ids = to_device(np.fromiter(chain(decodes, chunks), np.int64), self._executor.device)
        places = [(place, s.ahead) for place, s in enumerate(plan.decodes) if s.ahead is not None]
        if places:
            assert ahead is not None, "tokens are on the device, and nobody said where"
            to, rows = to_device(np.array(places, np.int64).T.copy(), ids.device).unbind()
            ids.index_copy_(0, to, ahead.index_select(0, rows))
        return ids

    def _measured(self, plan: StepPlan) -> Mapping[int, Rows[int]]:
        if self.sampling is None:
            return {}
        prompts = [i for i, chunk in enumerate(plan.chunks, len(plan.decodes)) if chunk.completes]
        spans = (range(s.computed, s.computed + 1 + len(plan.guesses.get(s, ()))) for s in plan.decodes)
        return self.sampling.choose([self.sampling.first_due(span) for span in spans], prompts)

    def _pack(self, chunks: Rows[Chunk], *, decodes: int, measured: Mapping[int, Rows[int]]) -> PackedStep:
        limits = []
        for chunk in chunks:
            limit = np.arange(chunk.start, chunk.end, dtype=np.int32)
            for image in chunk.images:
                limit[image.start - chunk.start : image.end - chunk.start] = image.end - 1
            limits.append(limit)
        tables = {}
        for group in self._layout.groups:
            width = max(-(-c.end // self._layout.block_size) for c in chunks)
            tables[group] = np.zeros((len(chunks), width), np.int32)
            for row, chunk in zip(tables[group], chunks, strict=True):
                table = chunk.sequence.running_blocks.tables[group][:width]
                row[: len(table)] = table
        return PackedStep(
            positions=np.concatenate([np.arange(c.start, c.end, dtype=np.int32) for c in chunks]),
            attend_limits=np.concatenate(limits),
            query_lens=np.array([c.end - c.start for c in chunks], np.int32),
            decodes=decodes,
            block_tables=tables,
            measured=measured,
        )

    def foresee(self, request: Request, computed: int) -> None:
        """Begin to encode the pictures of a request that waits, of whose prompt `computed` tokens are in the cache."""
        images = request.prompt.images
        pictures = (Picture(request.tenant, image) for image in images if image.start >= computed)
        self._pictures.foresee(request.id, pictures)

    def forget(self, request: Request) -> None:
        """The request has ended: let go of pictures that were encoded ahead for it alone."""
        self._pictures.forget(request.id)

    def _soft_tokens(self, chunks: Rows[Chunk], offsets: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Soft tokens [R, D] of all images in the step and the packed rows that they replace."""
        pictures, rows = [], []
        for chunk, offset in zip(chunks, offsets, strict=False):
            for image in chunk.images:
                first = offset + image.start - chunk.start
                pictures.append(Picture(chunk.sequence.tenant, image))
                rows.append(np.arange(first, first + image.length))
        if not pictures:
            return None, None
        return self._pictures.soft_tokens(pictures), to_device(np.concatenate(rows), self._executor.device)


class Done(NamedTuple):
    """Of all that the device had been given at some time."""

    done: Callable[[], None] = lambda: None
    """Waits for it."""
    over: Callable[[], bool] = lambda: True
    """Whether there is nothing to wait for."""


def when_done(device: torch.device) -> Done:
    """Of what the device has been given until now."""
    if device.type != "cuda":
        return Done()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def over() -> bool:
        try:
            return bool(event.query())  # type: ignore[no-untyped-call]
        except Exception:  # The device has failed. Who waits for it hears of that.
            return True

    return Done(event.synchronize, over)
