"""What the load has been like: how fast the queue moves, how long answers are."""

from __future__ import annotations

import math


class ServiceRate:
    """Tokens of work that leave the queue a second, measured while there is a queue.

    Parameters
    ----------
    half_life_s
        After this long of queueing, what was seen before counts half.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._decay = math.log(2) / half_life_s
        self._tokens = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    def admitted(self, tokens: int) -> None:
        """Work has left the queue."""
        if self._since is not None:
            self._tokens += tokens

    def tick(self, now: float, *, queueing: bool) -> None:
        """Time has passed; `queueing` is whether somebody waits from now on."""
        if self._since is not None:
            passed = now - self._since
            kept = math.exp(-self._decay * passed)
            self._tokens *= kept
            self._seconds = self._seconds * kept + passed
        self._since = now if queueing else None

    def seconds_for(self, tokens: int) -> float | None:
        """How long a queue of so much work takes; None while too little has been seen."""
        if self._seconds < 0.2 or self._tokens <= 0:
            return None
        return tokens * self._seconds / self._tokens


class AnswerLength:
    """The mean length of recent answers, in tokens."""

    def __init__(self, first_guess: int = 128, memory: int = 64) -> None:
        self._mean = float(first_guess)
        self._seen = 1
        self._memory = memory

    def observe(self, tokens: int) -> None:
        """An answer has come to its own end."""
        self._seen = min(self._seen + 1, self._memory)
        self._mean += (tokens - self._mean) / self._seen

    def expected(self, so_far: int, limit: int) -> int:
        """Tokens that an answer will have, of which there are `so_far` and can be `limit`.

        One that has outgrown the mean is taken to be about as long again as a short one: to always expect the end at
        the next token would admit others onto memory that is about to be needed.
        """
        guess = self._mean if so_far < self._mean else so_far + self._mean / 4
        return min(limit, max(so_far + 1, round(guess)))
