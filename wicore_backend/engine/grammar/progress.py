"""How far an answer is in its grammar, and the tokens that may come next: many answers' at once, as bits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from wicore_backend.engine.grammar.reasons import reason_of
from wicore_backend.errors import EngineError, InvalidArgumentError

_MOST_THREADS = 8

_NOT_ALLOWED = "doesn't satisfy the grammar"
"""In llguidance's words for a token that it has not allowed; all its others are for limits."""


class GrammarProgress:
    """One answer's place in its grammar. Used by one thread at a time.

    An answer is *complete* when the grammar lets nothing follow: it has ended with the token that made it so. Before,
    it may be that the grammar lets it end as well as go on; then the model's end-of-answer tokens are among the
    allowed.

    Parameters
    ----------
    matcher
        At the grammar's start; nobody else's.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def accept(self, token: int) -> None:
        """Take the answer's next token.

        Raises
        ------
        InvalidArgumentError
            If the grammar takes more than a step may spend on it.
        EngineError
            If it was none of the allowed, which the sampler would have to answer for.
        """
        if self.matcher.consume_token(token):
            return
        reason = reason_of(self.matcher.get_error())
        if _NOT_ALLOWED in reason:
            raise EngineError(f"token {token} is not what the grammar allows: {reason}")
        raise _too_much(reason)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        stopped: bool = self.matcher.is_stopped()
        return stopped


def allowed_tokens(answers: Mapping[int, GrammarProgress], rows: int, vocab: int) -> NDArray[np.uint8]:
    """Which tokens may come next, as bits: uint8 [rows, vocab / 8, rounded up to a multiple of 4], least bit first.

    They depend on the answers' tokens so far and on nothing else. Where the device computes beside the host, those of
    the step before are known by the time that the logits of this one are asked for, and not when it begins: so the
    bits are worked out after the telling, while the device computes this step (`engine/emission.py`).

    Parameters
    ----------
    answers
        Progress by row. A row without any may have every token.

    Raises
    ------
    InvalidArgumentError
        If a grammar takes more than a step may spend on it, or has come to where nothing can follow.
    """
    words = -(-vocab // 32)
    bits = np.full((rows, words), -1, np.int32)
    _fill(answers, bits)
    for row, answer in answers.items():
        if answer.matcher.is_error():
            raise _too_much(reason_of(answer.matcher.get_error()))
        if not bits[row].any():
            raise InvalidArgumentError("grammar: it has come to where no token can follow")
    return bits.view(np.uint8)


def _too_much(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"grammar: {reason}; simplify it")


def _fill(answers: Mapping[int, GrammarProgress], bits: NDArray[np.int32]) -> None:
    executor = _executor() if len(answers) > 1 else None
    if executor is not None:
        places = [(answer.matcher, row) for row, answer in answers.items()]
        executor.unsafe_compute_mask_ptr(places, bits.ctypes.data, bits.shape[1] * bits.itemsize, len(bits))
        return
    for row, answer in answers.items():
        answer.matcher.unsafe_compute_mask_ptr(bits[row].ctypes.data, bits.shape[1] * bits.itemsize)


@cache
def _executor() -> LLExecutor | None:
    """Threads for masks, if there are CPUs to spare: they serve every engine of the process."""
    threads = min(_MOST_THREADS, (os.cpu_count() or 1) // 4)
    return LLExecutor(threads) if threads > 1 else None
