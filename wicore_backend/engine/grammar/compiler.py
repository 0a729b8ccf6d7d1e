"""Grammars to matchers: bounded in time and memory, and kept for who asks for the same again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, TimeoutError
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from wicore_backend.engine.grammar.progress import GrammarProgress
from wicore_backend.engine.grammar.reasons import reason_of
from wicore_backend.engine.grammar.source import source_of
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.errors import InvalidArgumentError, OverloadedError
from wicore_backend.processor.tokenizer import Tokenizer

T = TypeVar("T")

_KEPT = 64
"""Compiled grammars: of the largest that the limits let through a few megabytes each, usually kilobytes."""

_AT_ONCE = 2
"""Grammars that compile at the same time: what more there are wait, and leave the CPUs to the engine."""

_LONGEST_S = 10.0
"""For a caller to wait. The limits below end the worst of grammars in about 2 s."""

_STACK_BYTES = 512 * 2**20
"""llguidance compiles a chain of references by recursion, and would end the process at its stack's end: on 8 MiB after
3,000 references. A grammar of the largest size has 6,000. Memory is taken as far as it is used."""

_LIMITS = LLParserLimits(
    step_max_items=10_000,
    step_lexer_fuel=100_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""A fifth to a half of llguidance's defaults: a mask takes 26 ms at the worst grammar found, on one core and with a
vocabulary of 262,208."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Any thread may call.

    Parameters
    ----------
    vocab_size
        Of the model: its logits may have more columns than the tokenizer has tokens.
    eos_token_ids
        The tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._slots = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        # A second and a half at a vocabulary of 262,208, and nobody has a grammar yet.
        self._tokenizer = _on_deep_stack(lambda: _tokenizer_of(tokenizer, vocab_size, sorted(eos_token_ids)))

    def has(self, grammar: Grammar | None) -> bool:
        """Whether `begin` has nothing to compile."""
        return grammar is None or self._compiled(source_of(grammar)) is not None

    def begin(self, grammar: Grammar | None, answers: int) -> list[GrammarProgress] | list[None]:
        """The progress of so many answers, none of which has a token; without a grammar there is none.

        Waits for what has to be compiled.

        Raises
        ------
        InvalidArgumentError
            If llguidance does not support the grammar, with what it says, or it takes too much.
        OverloadedError
            If too many others are being compiled.
        """
        if grammar is None:
            return [None] * answers
        source = source_of(grammar)
        matcher = self._compiled(source) or self._compile(grammar, source)
        return [GrammarProgress(matcher.deep_copy()) for _ in range(answers)]

    def _compiled(self, source: str) -> LLMatcher | None:
        with self._lock:
            matcher = self._kept.get(source)
            if matcher is not None:
                self._kept.move_to_end(source)
            return matcher

    def _keep(self, source: str, matcher: LLMatcher) -> None:
        with self._lock:
            self._kept[source] = matcher
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    def _compile(self, grammar: Grammar, source: str) -> LLMatcher:
        if not self._slots.acquire(timeout=_LONGEST_S):
            raise OverloadedError("other grammars are being compiled", retry_after_s=_LONGEST_S)
        if (matcher := self._compiled(source)) is not None:  # By who was before.
            self._slots.release()
            return matcher
        tokenizer = self._tokenizer

        def compile_it() -> LLMatcher:
            try:
                matcher = LLMatcher(tokenizer.result(), source, limits=_LIMITS, log_level=0)
                if not matcher.is_error():
                    matcher.compute_bitmask()  # Some grammars turn out to be impossible with their first token.
                if not matcher.is_error():
                    self._keep(source, matcher)  # Before the slot is free: who waits for it may want the same.
                return matcher
            finally:
                self._slots.release()

        try:
            compiling = _on_deep_stack(compile_it)
        except BaseException:
            self._slots.release()
            raise
        try:
            matcher = compiling.result(_LONGEST_S)
        except TimeoutError:
            raise InvalidArgumentError(
                f"grammar.{grammar.form} takes more than {_LONGEST_S:g} s to compile; simplify it"
            ) from None
        if matcher.is_error():
            reason = reason_of(matcher.get_error())
            raise InvalidArgumentError(f"grammar.{grammar.form} is not supported: {reason}")
        return matcher


def _tokenizer_of(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_token_ids)),
        n_vocab=vocab_size,
        eos_token=eos_token_ids,
    )


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes that each token adds to an answer, as the detokenizer has them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = [token for token in range(vocab_size) if tokenizer.is_special(token)]
        # A special token's are its name, by which a grammar can ask for it (`<start_of_turn>`).
        self.tokens = [
            tokenizer.token_text(token).encode() if tokenizer.is_special(token) else tokenizer.token_bytes(token)
            for token in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


_STARTING = threading.Lock()


def _on_deep_stack(work: Callable[[], T]) -> Future[T]:
    """Have a thread of its own do it, on a stack that deep recursion does not exhaust."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _STARTING:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="wicore-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done
