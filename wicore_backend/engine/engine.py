"""The engine: one loop on one thread that owns all state, one step at a time.

    take new and cancelled requests -> expire -> schedule -> run -> sample -> emit

Other threads reach the loop through one queue, and hear from it through each request's sink.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from wicore_backend.config import EngineConfig
from wicore_backend.engine.generation import Generation
from wicore_backend.engine.loading import LoadedModel, load_model
from wicore_backend.engine.request import FinishReason, Request, Sequence, Sink, TokenLogprob
from wicore_backend.engine.results import EventStream, Result
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.sampler import logprobs_of, sample
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Chunk, Scheduler
from wicore_backend.engine.statistics import BlockUsage, EngineStatistics, StatisticsRecorder
from wicore_backend.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineError,
    InvalidArgumentError,
    OverloadedError,
    WicoreError,
)
from wicore_backend.observability.logfmt import logfmt
from wicore_backend.processor.processor import ImageSource, PromptSource
from wicore_backend.processor.prompt import Prompt

Images = list[ImageSource]

_log = logging.getLogger(__name__)

_IDLE_CHECK_S = 1.0
"""After this long without work the loop proves its books."""

_LOGPROB_ROWS = 256
"""Rows of a prompt's logits computed at once: at a vocabulary of 262,208 these are 268 MB in float32."""


class Engine:
    """Gemma-3 on one device.

    Loads the model and starts the loop's thread; `close`, or leaving the `with` block, ends both.

    Raises
    ------
    InvalidArgumentError
        For settings that contradict each other or the model (`CheckpointError` for a bad model directory).
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._live: dict[str, Generation] = {}
        self._recorder = StatisticsRecorder()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False  # No more requests; set by any thread.
        self._broken = False  # The loop has ended on its own.
        self._ended = False  # Every request has had its last event; the loop's own.
        self._queued_or_running = 0
        loaded: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="wicore-engine", daemon=True)
        self._thread.start()
        self._model = loaded.result()
        self.processor = self._model.processor

    # What callers use, from any thread.

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        sink: Sink,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> str:
        """Queue one request and return its id; `sink` gets its events, the last one a FinishedEvent.

        Parameters
        ----------
        priority
            Smaller goes first.
        deadline_s
            Seconds from now after which the request ends, with what it has produced.

        Raises
        ------
        InvalidArgumentError
            If the prompt does not fit the context or a token id is not in the vocabulary.
        OverloadedError
            If the queue is full or the engine is closing.
        EngineError
            If the engine's loop has broken down.
        """
        params = params.completed(self._model.generation_defaults)
        self._check(prompt, params)
        room = self._model.max_model_len - len(prompt)
        now = time.monotonic()
        request = Request(
            id=request_id or secrets.token_hex(8),
            prompt=prompt,
            params=params,
            sink=sink,
            arrival=now,
            priority=priority,
            deadline=None if deadline_s is None else now + deadline_s,
        )
        generation = Generation(
            Sequence(request, max_tokens=len(prompt) + min(params.max_tokens or room, room)),
            token_bytes=self.processor.tokenizer.token_bytes,
            stop_tokens=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._model.eos_token_ids),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        )
        with self._lock:
            self._admit()
            self._queued_or_running += 1
            self._inbox.put(partial(self._add, generation))
        return request.id

    def cancel(self, request_id: str) -> None:
        """End a request, waiting or running, within one step. An id that is unknown, or ended, is no error."""
        self._inbox.put(partial(self._cancel, request_id))

    @overload
    def generate(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        raw: bool = False,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | None = None,
        *,
        images: list[Images] | None = None,
        raw: bool = False,
    ) -> list[Result]: ...

    @overload
    def generate(
        self,
        prompt: PromptSource | list[PromptSource],
        params: SamplingParams | None = None,
        *,
        images: Images | list[Images] | None = None,
        raw: bool = False,
    ) -> Result | list[Result]: ...

    def generate(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        images: Any = None,
        raw: bool = False,
    ) -> Result | list[Result]:
        """Answer one prompt, or a list of them together.

        Parameters
        ----------
        prompt
            A question as text, chat messages, or token ids; or a list of such prompts.
        images
            The prompt's images; for a list of prompts, a list for each.
        raw
            Take text as it is, without the chat template.

        Returns
        -------
        A Result for one prompt, a list of them for a list.

        Raises
        ------
        WicoreError
            The first error of any of the prompts; the others are then cancelled.
        """
        if not _is_many(prompt):
            with self.stream(prompt, params, images=images, raw=raw) as stream:
                return stream.collect()
        if images is not None and len(images) != len(prompt):
            raise InvalidArgumentError(f"{len(prompt)} prompts came with {len(images)} lists of images")
        with ExitStack() as closing:
            streams = [
                closing.enter_context(self.stream(p, params, images=i, raw=raw))
                for p, i in zip(prompt, images or [None] * len(prompt), strict=True)
            ]
            return [stream.collect() for stream in streams]

    def stream(
        self,
        prompt: PromptSource,
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        raw: bool = False,
    ) -> EventStream:
        """Queue one prompt, as for `generate`, and return its events as they come; the last is a FinishedEvent."""
        processed = self.processor.process(prompt, images=images or (), raw=raw)
        request_id = secrets.token_hex(8)
        stream = EventStream(partial(self.cancel, request_id))
        self.submit(processed, params or SamplingParams(), sink=stream.put, request_id=request_id)
        return stream

    def statistics(self) -> EngineStatistics:
        """The engine's numbers at this moment."""
        running = len(self._scheduler.running)
        return self._recorder.snapshot(
            running=running,
            # Those that the loop has not taken over yet wait as well.
            waiting=max(0, self._queued_or_running - running),
            blocks={g: BlockUsage(p.used, p.capacity) for g, p in self._model.blocks.pools.items()},
        )

    def close(self) -> None:
        """End the loop. Requests that have not ended are cancelled, each with its last event."""
        with self._lock:
            self._closed = True
        self._inbox.put(self._end)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self) -> None:
        """Raise OverloadedError unless there is a place in the queue."""
        if self._broken:
            raise EngineError("the engine has broken down, its log says why; restart it")
        if self._closed:
            raise OverloadedError("the engine is closing and takes no new requests", retry_after_s=5.0)
        limit = self.config.max_running + self.config.max_waiting
        if self._queued_or_running >= limit:
            self._recorder.refused += 1
            raise OverloadedError(
                f"{limit} requests are queued or running (max_running + max_waiting)", retry_after_s=1.0
            )

    def _check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise InvalidArgumentError unless the model can compute the request."""
        limit, vocab = self._model.max_model_len, self._model.vocab_size
        if not 1 <= len(prompt) < limit:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt):,} tokens; it takes 1 to {limit - 1:,} (max_model_len = {limit:,})"
            )
        for token in (int(prompt.token_ids.min()), int(prompt.token_ids.max()), *params.stop_token_ids):
            if not 0 <= token < vocab:
                raise InvalidArgumentError(f"token id {token} is outside the vocabulary of {vocab:,}")
        if prompt.images and not self._model.soft_tokens_per_image:
            raise InvalidArgumentError("this model has no vision tower; send text only")
        for image in prompt.images:
            if image.length != self._model.soft_tokens_per_image or not 0 <= image.start <= len(prompt) - image.length:
                raise InvalidArgumentError(
                    f"an image spans tokens {image.start} to {image.end} of {len(prompt)}; each takes "
                    f"{self._model.soft_tokens_per_image} inside the prompt"
                )

    # What runs on the loop's thread.

    @torch.inference_mode()
    def _run(self, loaded: Future[LoadedModel]) -> None:
        # The model is loaded here, since each thread that computes has its own pool of OpenMP threads: with a second
        # pool there are more threads than cores, their waits turn into sleeps, and a CPU's decode step takes 1.5 times.
        try:
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            self._model = load_model(self.config)
        except BaseException as error:
            loaded.set_exception(error)
            return
        self._scheduler = Scheduler(
            self._model.blocks, max_batch_tokens=self.config.max_batch_tokens, max_running=self.config.max_running
        )
        loaded.set_result(self._model)
        try:
            self._loop()
        except Exception as error:
            _log.exception("the engine's books are wrong; it ends, and so does every request")
            self._break_down(error)

    def _loop(self) -> None:
        while not self._ended:
            self._take_inbox()
            self._expire()
            if self._scheduler.has_work:
                try:
                    self._step()
                except Exception as error:
                    _log.exception("a step failed; its requests end with an error")
                    self._fail_running(error)
            elif not self._ended:
                self._idle()

    def _take_inbox(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _idle(self) -> None:
        """Wait for something to do, and prove the books if nothing comes soon."""
        try:
            self._inbox.get(timeout=_IDLE_CHECK_S)()
        except Empty:
            self._model.blocks.check_integrity()
            self._inbox.get()()

    def _step(self) -> None:
        began = time.monotonic()
        chunks = self._scheduler.plan()
        generations = [self._live[chunk.sequence.request.id] for chunk in chunks]
        for generation in generations:
            generation.start(began)
        output = self._model.runner.run(chunks)
        self._scheduler.complete(chunks)
        for chunk, generation, offset in zip(chunks, generations, output.offsets, strict=False):
            if generation.request.params.prompt_logprobs is not None:
                generation.prompt_logprobs += _prompt_logprobs(chunk, offset, output)
        # Rows whose chunk reaches the sequence's end; the other chunks are the first parts of long prompts.
        ready = [row for row, chunk in enumerate(chunks) if chunk.completes]
        if ready:
            self._emit(
                [generations[row] for row in ready], output.logits([output.offsets[row + 1] - 1 for row in ready])
            )
        self._recorder.step(time.monotonic() - began)

    def _emit(self, generations: list[Generation], logits: Tensor) -> None:
        """Choose each sequence's next token from its row of `logits` [R, V] and tell its caller."""
        logprob_rows = [row for row, g in enumerate(generations) if g.request.params.logprobs is not None]
        unchanged = logits[logprob_rows]  # A copy: sampling writes penalties into its logits.
        tokens = sample(logits, [generation.sampling_row for generation in generations])
        logprobs: dict[int, TokenLogprob] = {}
        if logprob_rows:
            tops = [generations[row].request.params.logprobs or 0 for row in logprob_rows]
            chosen = logprobs_of(unchanged, [tokens[row] for row in logprob_rows], tops)
            logprobs = dict(zip(logprob_rows, chosen, strict=True))
        now = time.monotonic()
        for row, (generation, token) in enumerate(zip(generations, tokens, strict=True)):
            reason = generation.push(token, logprobs.get(row), now)
            if reason is not None:
                self._finish(generation, reason)

    def _add(self, generation: Generation) -> None:
        request = generation.request
        if request.id in self._live:
            error = InvalidArgumentError(f"a request with id {request.id!r} is already running; ids must differ")
            self._conclude(generation, FinishReason.ERROR, error)
            return
        self._live[request.id] = generation
        self._scheduler.add(generation.sequence)

    def _cancel(self, request_id: str) -> None:
        generation = self._live.get(request_id)
        if generation is not None:
            self._finish(generation, FinishReason.CANCELLED, CancelledError("the request was cancelled"))

    def _end(self) -> None:
        for generation in list(self._live.values()):
            self._finish(generation, FinishReason.CANCELLED, CancelledError("the engine is closing"))
        self._ended = True

    def _break_down(self, error: Exception) -> None:
        """End every request without touching the books, and take no more."""
        with self._lock:
            self._closed = self._broken = True
        message = f"the engine broke down: {error}; restart it"
        while not self._inbox.empty():
            with suppress(
                Exception
            ):  # Requests that were on their way in, to end with the others, or on their way out.
                self._inbox.get_nowait()()
        for generation in self._live.values():
            self._conclude(generation, FinishReason.ERROR, EngineError(message))
        self._live.clear()

    def _expire(self) -> None:
        now = time.monotonic()
        for generation in [g for g in self._live.values() if g.request.deadline is not None]:
            request = generation.request
            if request.deadline is not None and now >= request.deadline:
                error = DeadlineExceededError(f"the deadline of {request.deadline - request.arrival:.3f} s has passed")
                self._finish(generation, FinishReason.DEADLINE, error)

    def _fail_running(self, error: Exception) -> None:
        for sequence in list(self._scheduler.running):
            message = f"the engine failed while it computed this request: {error}"
            self._finish(self._live[sequence.request.id], FinishReason.ERROR, EngineError(message))

    def _finish(self, generation: Generation, reason: FinishReason, error: WicoreError | None = None) -> None:
        del self._live[generation.request.id]
        try:
            self._scheduler.remove(generation.sequence)
        finally:
            self._conclude(generation, reason, error)

    def _conclude(self, generation: Generation, reason: FinishReason, error: WicoreError | None) -> None:
        with self._lock:
            self._queued_or_running -= 1
        event = generation.finish(reason, time.monotonic(), error)
        self._recorder.finished(event)
        _log.info(
            logfmt(
                "request",
                id=generation.request.id,
                reason=reason,
                code=error and error.code,
                images=len(generation.request.prompt.images),
                **asdict(event.usage),
                tpot_s=event.usage.tpot_s,
                error=error,
            )
        )


def _prompt_logprobs(chunk: Chunk, offset: int, output: StepOutput) -> list[TokenLogprob | None]:
    """Log-probabilities of the prompt's tokens that follow the chunk's, and None for the prompt's first."""
    prompt = chunk.sequence.request.prompt.token_ids
    following = prompt[chunk.start + 1 : chunk.end + 1].tolist()
    logprobs: list[TokenLogprob | None] = [None] if chunk.start == 0 else []
    top = chunk.sequence.request.params.prompt_logprobs or 0
    for first in range(0, len(following), _LOGPROB_ROWS):
        tokens = following[first : first + _LOGPROB_ROWS]
        rows = range(offset + first, offset + first + len(tokens))
        logprobs += logprobs_of(output.logits(rows), tokens, [top] * len(tokens))
    return logprobs


def _is_many(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts: not a text, nor one prompt's chat messages or token ids."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], Mapping | int | np.integer)
