"""What the scheduler may expect of what is to come, by what it has seen. Pure arithmetic: no tensors, no clock."""

from __future__ import annotations

from wicore_backend.engine.load import AnswerLength, ServiceRate
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.step_time import StepShape, StepTimeModel

_SOONEST_S, _LATEST_S, _UNKNOWN_S = 0.1, 60.0, 1.0
"""When one who was turned away may come again: bounds, and what is said while nobody knows."""


class Expectations:
    """How long answers become, how fast the queue moves, how long a prompt takes.

    It has no states, and so no checker: three averages, each of which begins with nothing seen. Until then an answer is
    as long as a first guess (`AnswerLength`) and nothing takes any time, so that nobody is turned away on suspicion.
    """

    def __init__(self, step_time: StepTimeModel, *, max_batch_tokens: int) -> None:
        self._step_time = step_time
        self._max_batch_tokens = max_batch_tokens
        self._answers = AnswerLength()
        self._rate = ServiceRate()

    # What is learnt.

    def answered(self, tokens: int) -> None:
        """An answer has come to its own end."""
        self._answers.observe(tokens)

    def admitted(self, tokens: int) -> None:
        """So much work has left the queue."""
        self._rate.admitted(tokens)

    def tick(self, now: float, *, queueing: bool) -> None:
        """Time has passed; `queueing` is whether somebody waits from now on."""
        self._rate.tick(now, queueing=queueing)

    # What follows from it.

    def tokens(self, sequence: Sequence) -> int:
        """Tokens that a sequence will have in the end, prompt and answer together."""
        prompt = sequence.prompt_len
        return prompt + self._answers.expected(len(sequence.tokens) - prompt, sequence.max_tokens - prompt)

    def prefill_seconds(self, tokens: int, start: int) -> float:
        """Least time that so many tokens take from `start` on, alone on the machine; 0 while nobody knows."""
        if not self._step_time.ready:
            return 0.0
        left = tokens - start
        pairs = start * left + left * left // 2
        steps = -(-left // self._max_batch_tokens)
        once = self._step_time.predict(StepShape(0, 0, 0, 0))
        return (steps - 1) * once + self._step_time.predict(StepShape(left, 1, 0, pairs, 1))

    def queue_seconds(self, tokens: int) -> float:
        """How long a queue of so much work takes; 0 while nobody knows."""
        return self._rate.seconds_for(tokens) or 0.0

    def retry_after(self, tokens: int) -> float:
        """Seconds after which a queue of so much work will be gone, as one tells those who are turned away."""
        seconds = self._rate.seconds_for(tokens)
        return _UNKNOWN_S if seconds is None else min(_LATEST_S, max(_SOONEST_S, seconds))
