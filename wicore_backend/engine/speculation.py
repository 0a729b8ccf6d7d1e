"""More than one token a step: what follows is guessed from the text itself, and the model says how far that is right.

Where an answer repeats what stands before it (it quotes, sums up, edits), the tokens that followed the last few of them
the time before are a good guess (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding). A step then
computes a sequence's next token and the guessed ones after it, and each of their rows tells the token that comes next.
Which one depends on the logits, the request's seed and the place in the answer alone, so that a guess that is right is
what would have come one by one, and the first that is wrong ends what the step is good for.

A step with guesses takes longer, and on CUDA the host has to read the tokens before it can plan the next one; and its
attention, which is that of pieces of prompt, may take longer by more than its tokens say, the more keys there are.
Whether guessing pays is measured on the steps themselves, among those with about as many sequences and keys; where it
does not, it is tried again now and then.
"""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from wicore_backend.engine.request import Sequence

_LONGEST_MATCH, _SHORTEST_MATCH = 8, 3
"""Of the last tokens, so many must stand before in the same order; the longest match gives the guess."""

_PLACES = 64
"""Of the places where the last token stands, the latest are looked at."""

_FIRST_GUESS = 4
"""Tokens of a sequence's first guess; then twice as many after one that was right, and one more than were right."""

_TRIAL = 4
"""Steps with guesses that are judged together: one alone may be any."""

_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024
"""Steps without guesses after a trial that did not pay; each further one doubles them."""

_RECHECK = 64
"""Of so many steps while guessing pays, one is without, so that what such a step takes stays known."""

_RATE = 0.2
"""Weight of the latest step in averages."""

_WORTH = 1.05
"""Tokens a second with guesses, over those without, from which on guesses are made."""


class Lookup:
    """Guesses for one sequence, from its own tokens."""

    def __init__(self) -> None:
        self._tokens: NDArray[np.int32] = np.empty(0, np.int32)
        self._count = 0
        self._length = _FIRST_GUESS

    def guess(self, tokens: list[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow `tokens`, which begin with those of the last call."""
        self._take(tokens)
        count, known = self._count, self._tokens[: self._count]
        follows, longest = 0, _SHORTEST_MATCH - 1
        for place in np.flatnonzero(known[:-1] == known[-1])[::-1][:_PLACES].tolist():
            reach = min(_LONGEST_MATCH, place + 1)
            differ = known[place + 1 - reach : place + 1] != known[count - reach :]
            match = reach if not differ.any() else int(differ[::-1].argmax())
            if match > longest:
                follows, longest = place + 1, match
                if match == _LONGEST_MATCH:
                    break
        return tuple(known[follows : follows + min(most, self._length)].tolist()) if follows else ()

    def learn(self, right: int, guessed: int) -> None:
        """So many of so many guessed tokens were right."""
        self._length = 2 * guessed if right == guessed else right + 1

    def _take(self, tokens: list[int]) -> None:
        if len(tokens) > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._count], np.empty(len(tokens), np.int32)])
        self._tokens[self._count : len(tokens)] = tokens[self._count :]
        self._count = len(tokens)


class _Trial:
    """Whether guessing pays in steps with about as many sequences and keys."""

    def __init__(self) -> None:
        self.left = _FIRST_PAUSE
        """Steps without guesses that are to come."""
        self.plain_s: float | None = None
        """What a sequence's share of a step without guesses takes."""
        self._pause = _FIRST_PAUSE
        self._gain = 0.0
        self._judged = 0

    def observe_plain(self, each_s: float) -> None:
        """A step without guesses took so long for each of its sequences."""
        self.plain_s = each_s if self.plain_s is None else self.plain_s + _RATE * (each_s - self.plain_s)
        self.left = max(0, self.left - 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with guesses gave so many tokens."""
        if self.plain_s is None:  # Some left after guesses were wanted, and so few were never seen without.
            return
        self._judged += 1
        self._gain += (tokens / seconds * self.plain_s - self._gain) * max(_RATE, 1 / self._judged)
        if self._judged % _TRIAL:
            return
        if self._gain < _WORTH:
            self.rest()
        else:
            self._pause = _FIRST_PAUSE
            self.left = int(self._judged % _RECHECK == 0)

    def rest(self) -> None:
        """Guess nothing for a while, and for twice as long the next time."""
        self.left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self._gain, self._judged = 0.0, 0


class Speculator:
    """Which steps are to have guesses, and what they guess.

    Parameters
    ----------
    most
        Tokens that are guessed for a sequence at once, at most; 0 guesses none, ever.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lookups: WeakKeyDictionary[Sequence, Lookup] = WeakKeyDictionary()
        # By number of decodes and of the keys that they read, in powers of two.
        self._trials: defaultdict[tuple[int, int], _Trial] = defaultdict(_Trial)

    def wants(self, decodes: int, keys: int) -> bool:
        """Whether a step of so many decodes, which read so many keys, is to have guesses.

        Their tokens must be known when it is planned.
        """
        trial = self._trials[_size(decodes, keys)]
        return self._most > 0 and trial.plain_s is not None and not trial.left

    def guess(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow those of a sequence that decodes."""
        if not may_be_guessed(sequence) or most <= 0:
            return ()
        lookup = self._lookups.setdefault(sequence, Lookup())
        return lookup.guess(sequence.tokens, min(most, self._most))

    def learn(self, sequence: Sequence, *, right: int, guessed: int) -> None:
        """So many of the tokens guessed for a sequence were right."""
        if sequence in self._lookups:
            self._lookups[sequence].learn(right, guessed)

    def observe(self, *, decodes: int, keys: int, tokens: int, seconds: float, guessing: bool) -> None:
        """A step of `decodes` alone, which read so many `keys`, gave `tokens`.

        It was planned so that it could have guesses, or not.
        """
        trial = self._trials[_size(decodes, keys)]
        if guessing:
            trial.observe(tokens, seconds)
        else:
            trial.observe_plain(seconds / decodes)

    def rest(self, decodes: int, keys: int) -> None:
        """Such a step with guesses failed, for lack of memory perhaps: have none for a while."""
        self._trials[_size(decodes, keys)].rest()


def _size(decodes: int, keys: int) -> tuple[int, int]:
    return decodes.bit_length(), keys.bit_length()


def may_be_guessed(sequence: Sequence) -> bool:
    """Whether a token's choice depends on nothing that the tokens before it change."""
    params = sequence.request.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    told = params.logprobs is not None or params.best_of is not None
    return not (penalised or told or params.grammar is not None or sequence.answered < params.min_tokens)
