"""The sequences that decode, and the blocks that they are about to write. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

from wicore_backend.engine.plan import MOST_GUESSED, Guess
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.blocks import BlockManager

_MOST_AHEAD = 4
"""Blocks that a decode gets at once where there is plenty: to place one costs almost as much as to place several."""

_NOTHING: Mapping[Sequence, tuple[int, ...]] = MappingProxyType({})


class Decodes:
    """Who decodes, who of them begins a block with the next step, and how many keys they see.

    A sequence that decodes has one token left to compute, and each step computes that of all of them. So the steps in
    which one begins a block are known when it is added: those whose number leaves, by the size of a block, one and the
    same remainder. It is kept under that, so that a step looks at those that begin a block, and at no others.

    With a budget (`hmt/bounded_kv.py`) those that begin a block, or to decode, are held to it first.

    `check_integrity` proves remainders and keys from what each sequence has computed.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._steps = 0
        self._remainders: dict[Sequence, int] = {}
        self._beginning: list[dict[Sequence, None]] = [{} for _ in range(blocks.block_size)]  # the other way around
        self._unbounded: list[Sequence] = []  # with a budget, who has begun to decode and may have too many blocks
        self._keys = 0

    def __len__(self) -> int:
        return len(self._remainders)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._remainders)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._remainders

    @property
    def keys(self) -> int:
        """Keys that the next step's decodes see in the global group."""
        return self._keys

    def shape(self, guesses: Mapping[Sequence, tuple[int, ...]] = _NOTHING) -> StepShape:
        """What the step-time model sees of a step of all decodes, with `guesses`."""
        count = len(self._remainders)
        if not guesses:
            return StepShape(count, count, self._keys, 0)
        more = sum(map(len, guesses.values()))
        pairs = sum(len(tokens) * sequence.computed for sequence, tokens in guesses.items())
        return StepShape(count + more, count, self._keys, pairs)

    # Who comes, gets on and goes.

    def add(self, sequence: Sequence) -> None:
        """From now on the sequence is decoded."""
        self._note_remainder(sequence)
        self._keys += self._visible(sequence)
        if self._blocks.budget is not None:
            self._unbounded.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is decoded no more; it still has its blocks."""
        del self._beginning[self._remainders.pop(sequence)][sequence]
        self._keys -= self._visible(sequence)

    def computed(self, decodes: Collection[Sequence]) -> None:
        """A step has been computed, with these in it: all, but those that are about to be removed."""
        self._steps += 1
        self._keys += len(decodes)
        for sequence in decodes:
            sequence.computed += 1

    def advance(self, sequence: Sequence) -> None:
        """One has computed a token more than the others, which had been guessed."""
        sequence.computed += 1
        self._keys += 1
        del self._beginning[self._remainders[sequence]][sequence]
        self._note_remainder(sequence)

    # Blocks for the next step.

    def grow(self) -> list[Sequence]:
        """Place what the next step writes, where there is plenty; returns those that still need one block each."""
        size = self._blocks.block_size
        beginning = self._beginning[self._steps % size]
        if self._blocks.budget is not None:
            self._bound(beginning)
        ends = [s for s in beginning if s.computed >= s.running_blocks.stop * size]
        ahead = min(_MOST_AHEAD, self._blocks.spare // len(self._remainders)) if ends else 0
        if ahead > 0 and self._blocks.budget is None:
            long = [(s.running_blocks, s.computed) for s in ends if s.max_tokens - s.computed >= ahead * size]
            self._blocks.extend_all(long, ahead)
            ends = [s for s in ends if s.max_tokens - s.computed < ahead * size]
        return ends

    def place_guesses(self, guess: Guess, *, max_batch_tokens: int) -> dict[Sequence, tuple[int, ...]]:
        """Guesses, as far as there is room for them without anybody giving way."""
        placed: dict[Sequence, tuple[int, ...]] = {}
        if self._blocks.budget is not None:
            return placed
        left = min(MOST_GUESSED, max_batch_tokens - len(self._remainders))
        for sequence in self._remainders:
            tokens = guess(sequence, min(left, sequence.max_tokens - len(sequence.tokens) - 1))
            end = sequence.computed + 1 + len(tokens)
            if tokens and self._blocks.extend(sequence.running_blocks, sequence.computed, end):
                placed[sequence] = tokens
                left -= len(tokens)
        return placed

    def _bound(self, beginning: Iterable[Sequence]) -> None:
        """Have those who begin a block, or to decode, keep what the budget allows."""
        for sequence in dict.fromkeys((*beginning, *self._unbounded)):
            if sequence in self._remainders:
                self._keys -= self._visible(sequence)
                self._blocks.bound(sequence.running_blocks, sequence.computed)
                self._keys += self._visible(sequence)
        self._unbounded.clear()

    def _note_remainder(self, sequence: Sequence) -> None:
        remainder = self._remainders[sequence] = (self._steps - sequence.computed) % self._blocks.block_size
        self._beginning[remainder][sequence] = None

    def _visible(self, sequence: Sequence) -> int:
        """Keys that a decode of the sequence sees in the global group."""
        return sequence.computed - sequence.running_blocks.holes * self._blocks.block_size

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is noted follows from what each sequence has computed."""
        size = self._blocks.block_size
        assert all(s.uncomputed == 1 for s in self), "a decoding sequence has more than one token to compute"
        assert self._keys == sum(map(self._visible, self)), "the decodes' keys are miscounted"
        assert all(
            s in self._beginning[remainder] and (self._steps - s.computed - remainder) % size == 0
            for s, remainder in self._remainders.items()
        ), "a decode begins its blocks in other steps than it is said to"
        assert sum(map(len, self._beginning)) == len(self), "one is to begin a block, and does not decode"
