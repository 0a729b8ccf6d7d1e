"""Who computes what in the next step. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from wicore_backend.engine.request import Sequence
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.processor.prompt import PromptImage


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` - 1 of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.end == len(self.sequence.tokens)

    @property
    def images(self) -> list[PromptImage]:
        """The images whose soft tokens the chunk computes, all of each."""
        return [i for i in self.sequence.request.prompt.images if self.start <= i.start < self.end]


class Scheduler:
    """Iteration-level batching under a token budget: decodes first, then prompts in chunks, in order of the queue.

    A sequence is admitted when the blocks of its longest possible answer are free, so that a running sequence never
    lacks memory. Nobody overtakes: while the head of the queue does not fit, those behind it wait as well.

    Parameters
    ----------
    max_batch_tokens
        Tokens of one step; at least `max_running` plus the tokens of an image, since an image is never split.
    """

    def __init__(self, blocks: BlockManager, *, max_batch_tokens: int, max_running: int) -> None:
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue, at the place its priority gives it."""
        insort(self.waiting, sequence, key=lambda waiting: waiting.request.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and release its blocks."""
        if sequence.blocks is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._blocks.close(sequence.blocks)
            sequence.blocks = None

    def plan(self) -> list[Chunk]:
        """The next step's chunks, decodes first, their blocks in place. Admits waiting sequences."""
        chunks = [Chunk(s, s.computed, len(s.tokens)) for s in self.running if s.uncomputed == 1]
        prefilling = deque(s for s in self.running if s.uncomputed > 1)
        budget = self._max_batch_tokens - len(chunks)
        while budget > 0 and (sequence := prefilling.popleft() if prefilling else self._admit()):
            end = _chunk_end(sequence, budget)
            if end == sequence.computed:  # An image that is larger than what is left of the budget.
                break
            chunks.append(Chunk(sequence, sequence.computed, end))
            budget -= end - sequence.computed
        for chunk in chunks:
            self._blocks.extend(chunk.sequence.running_blocks, chunk.start, chunk.end)
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        """Note that a step has computed `chunks`."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.end

    def _admit(self) -> Sequence | None:
        """The head of the queue, running now, or None if it has to wait."""
        if not self.waiting or len(self.running) >= self._max_running:
            return None
        if not self._blocks.fits(self.waiting[0].max_tokens):
            return None
        sequence = self.waiting.pop(0)
        sequence.blocks = self._blocks.open(sequence.max_tokens)
        self.running.append(sequence)
        return sequence


def _chunk_end(sequence: Sequence, budget: int) -> int:
    """Where a chunk of at most `budget` tokens ends that splits no image."""
    end = min(len(sequence.tokens), sequence.computed + budget)
    for image in sequence.request.prompt.images:
        if image.start < end < image.end:
            return image.start
    return end
