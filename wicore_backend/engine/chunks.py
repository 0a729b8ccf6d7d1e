"""The prompts' part of one step. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.plan import Chunk
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.step_time import StepShape


class Chunks:
    """Chunks of prompts, under what the decodes leave of the tokens and of the time of one step.

    A sequence has one chunk at most. One that gives way after it got its chunk `lost` it: the step does not compute it,
    but what the chunk took is not given to others.

    Parameters
    ----------
    decodes
        What else the step computes.
    tokens
        How many more it may compute.
    """

    def __init__(self, pacer: Pacer, decodes: StepShape, *, tokens: int) -> None:
        self._pacer = pacer
        self._shape = decodes
        self._tokens = tokens
        self._chunks: list[Chunk] = []

    def __bool__(self) -> bool:
        """Whether anybody has got a chunk, lost or not."""
        return bool(self._chunks)

    @property
    def shape(self) -> StepShape:
        """The decodes, and all chunks, lost or not."""
        return self._shape

    @property
    def room(self) -> bool:
        """Whether there are tokens left."""
        return self._tokens > 0

    @property
    def any_lost(self) -> bool:
        """Whether somebody with a chunk gave way."""
        return any(chunk.sequence.blocks is None for chunk in self._chunks)

    @property
    def kept(self) -> list[Chunk]:
        """Those that the step is to compute."""
        return [chunk for chunk in self._chunks if chunk.sequence.blocks is not None]

    def end(self, sequence: Sequence, *, share: float = 1.0) -> int:
        """Where a sequence's chunk ends if it may take a share of the tokens and of the time that are left."""
        most = min(sequence.uncomputed, int(share * self._tokens))
        tokens = self._pacer.tokens(self._shape, context=sequence.computed, most=most, share=share)
        return _unsplit_end(sequence, tokens)

    def add(self, sequence: Sequence, end: int) -> None:
        """The sequence gets its chunk, up to `end`."""
        tokens = end - sequence.computed
        self._chunks.append(Chunk(sequence, sequence.computed, end))
        self._shape = self._shape.with_prefill(tokens, sequence.computed)
        self._tokens -= tokens


def _unsplit_end(sequence: Sequence, budget: int) -> int:
    """Where a chunk of at most `budget` tokens ends that splits no image."""
    end = min(len(sequence.tokens), sequence.computed + budget)
    for image in sequence.request.prompt.images:
        if image.start < end < image.end:
            return image.start
    return end
