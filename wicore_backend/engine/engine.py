"""The engine: one loop on one thread that owns all state, one step at a time.

    take new and cancelled requests -> expire -> schedule -> run -> sample -> emit

Where the device computes beside the host (CUDA), a step is scheduled and given to it before the tokens of the one
before have been read: those are told while the device computes. A sequence that ends with such a token has then been
decoded once in vain, and nobody hears of it. That next step is scheduled just before the device needs it, so that who
comes while it computes is in it.

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
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
import torch

from wicore_backend.config import EngineConfig
from wicore_backend.engine.computation import Computed, StepFailedError, compute
from wicore_backend.engine.emission import Choice, Emitter
from wicore_backend.engine.explain import CachedPrompt, CacheQuestion
from wicore_backend.engine.generation import Generation
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.progress import GrammarProgress
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.health import Health, HealthMonitor
from wicore_backend.engine.job import Job
from wicore_backend.engine.lead import Lead
from wicore_backend.engine.ledger import CLOSING_RETRY_S, RequestLedger
from wicore_backend.engine.loading import LoadedModel, load_model
from wicore_backend.engine.plan import RejectReason, SchedulerLimits, StepPlan
from wicore_backend.engine.probe import compute_for_nobody
from wicore_backend.engine.request import Deadlines, PriorityClass, Request, Retention, Sequence, Sink
from wicore_backend.engine.results import EventStream, Result
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.speculation import Speculator
from wicore_backend.engine.statistics import EngineStatistics, StatisticsRecorder
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.errors import EngineError, InvalidArgumentError, OverloadedError
from wicore_backend.hmt.names import BlockNames
from wicore_backend.processor.processor import ImageSource, PromptSource
from wicore_backend.processor.prompt import Prompt

Images = list[ImageSource]

_log = logging.getLogger(__name__)

_IDLE_CHECK_S = 1.0
"""After this long without work the loop proves its books."""

_EMPTY_STEP_S = 0.001
"""Longest pause after a plan of nothing, which means that everybody waits for memory, or for blocks from the disk."""

_GLANCE_S = 0.002
"""While the device computes, the loop looks after so long whether it is done before its time."""

_PERSIST_S = 4.0
"""How long an engine that ends may take to store what it has cached. A server gives its models 8 s for everything."""


@dataclass(frozen=True, slots=True, eq=False)
class _Untold:
    """A step that the device has been given, whose tokens nobody has been told."""

    plan: StepPlan
    began: float
    launched: float
    computed: Computed
    choice: Choice | None
    guessing: bool
    """It was planned so that it could have guesses."""


class Engine:
    """Gemma-3 on one device.

    Loads the model and starts the loop's thread; `close`, or leaving the `with` block, ends both.

    Parameters
    ----------
    when_idle
        Called on the loop's thread when there has been nothing to do for a while, once until there is again.

    Raises
    ------
    InvalidArgumentError
        For settings that contradict each other or the model (`CheckpointError` for a bad model directory).
    """

    def __init__(self, config: EngineConfig, *, when_idle: Callable[[], object] = lambda: None) -> None:
        self.config = config
        self._when_idle = when_idle
        self._recorder = StatisticsRecorder()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False  # No more requests; set by any thread.
        self._broken = False  # The loop has ended on its own.
        self._ended = False  # Every request has had its last event; the loop's own.
        self._draining = False
        self._untold: _Untold | None = None
        self._done = 0.0  # When it last knew the device to be done with a step, ...
        self._told = 0.0  # ... and when it had told what that gave.
        self._unfinished = 0
        self._emptied = threading.Condition(self._lock)
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
        priority: int = PriorityClass.INTERACTIVE,
        tenant: str = "",
        deadlines: Deadlines | None = None,
        retention: Retention | None = None,
        arrival: float | None = None,
    ) -> str:
        """Queue one request and return its id; `sink` gets its events, the last one a FinishedEvent.

        A request that is turned away, because the queue is full or it cannot be in time, hears of it by that event.

        Parameters
        ----------
        priority
            Smaller goes first; `PriorityClass` has names.
        tenant
            On whose account it runs: tenants who compete get equal service, and share no cached block.
        deadlines
            Times that the request may take, counted from its arrival.
        retention
            What it says of the worth of its cached blocks.
        arrival
            When the request came, as `time.monotonic` had it then; None is now.

        Raises
        ------
        InvalidArgumentError
            If the prompt does not fit the context, a token id is not in the vocabulary, or the grammar is not
            supported: it is compiled here, on the caller's thread, which may take a second or two.
        OverloadedError
            If the engine is closing or draining, or has too many grammars to compile.
        EngineError
            If the engine's loop has broken down.
        """
        params = params.completed(self._model.generation_defaults)
        self._check(prompt, params)
        with self._lock:
            self._check_open(for_request=True)  # Before a grammar is compiled for nobody, which a stop would wait for.
        now = time.monotonic()
        request = Request(
            id=request_id or secrets.token_hex(8),
            prompt=prompt,
            params=params,
            sink=sink,
            arrival=now if arrival is None else min(arrival, now),
            priority=priority,
            tenant=tenant,
            deadlines=deadlines or Deadlines(),
            retention=retention or Retention(),
        )
        seed = secrets.randbits(63) if params.seed is None else params.seed
        grammars = self._grammars.begin(params.grammar, params.answers)
        generations = [self._generation(request, index, seed, grammar) for index, grammar in enumerate(grammars)]
        job = Job(request, generations)
        with self._lock:
            self._check_open(for_request=True)
            self._unfinished += 1
            self._inbox.put(partial(self._add, job))
        return request.id

    def _generation(self, request: Request, index: int, seed: int, grammar: GrammarProgress | None) -> Generation:
        """One of a request's answers, its blocks' names worked out here, on the caller's thread."""
        params, room = request.params, self._model.max_model_len - len(request.prompt)
        sequence = Sequence(request, len(request.prompt) + min(params.max_tokens or room, room), index=index)
        if params.prompt_logprobs is None:  # Those need the whole prompt computed.
            names = BlockNames(self._model.name_scheme, sequence.tokens, request.prompt.images, request.tenant)
            sequence.twin_key = names.whole(len(request.prompt))
            sequence.names = names if self.config.prefix_cache else None
        return Generation(
            sequence,
            token_bytes=self.processor.tokenizer.token_bytes,
            stop_tokens=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._model.eos_token_ids),
            seed=(seed + index) % 2**63,
            grammar=grammar,
        )

    def has_compiled(self, grammar: Grammar | None) -> bool:
        """Whether `submit` of a request with this grammar takes no longer than without one."""
        return self._grammars.has(grammar)

    def compile(self, grammar: Grammar | None) -> None:
        """Have a grammar compiled, so that `submit` does not wait for it; raises what `submit` would."""
        with self._lock:
            self._check_open(for_request=True)
        self._grammars.begin(grammar, 0)

    def cancel(self, request_id: str) -> None:
        """End a request, waiting or running, within one step. An id that is unknown, or ended, is no error."""
        self._inbox.put(partial(self._ledger.cancel, request_id))

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
        return self._recorder.snapshot(
            self._model.executor,
            self._scheduler,
            self._model.blocks,
            now=time.monotonic(),
            unfinished=self._unfinished,
        )

    def explain_cache(
        self, prompt: PromptSource, *, images: Images | None = None, raw: bool = False, tenant: str = ""
    ) -> CachedPrompt:
        """Where the blocks of a prompt, given as for `generate`, are at this moment. Not to be called from a sink."""
        processed = self.processor.process(prompt, images=images or (), raw=raw)
        names = BlockNames(self._model.name_scheme, processed.token_ids.tolist(), processed.images, tenant)
        blocks, lower = self._model.blocks, self._model.blocks.lower
        question = CacheQuestion(blocks, names, len(processed), None if lower is None else lower.host.explain)
        with self._lock:
            self._check_open()
            self._inbox.put(question.answer)
        return question.result()

    def health(self) -> Health:
        """Whether new requests are in good hands here."""
        if self._broken:
            return Health(False, "the engine has broken down; its log says why")
        if self._draining or self._closed:
            return Health(False, "the engine is draining")
        return self._monitor.health()

    def drain(self, grace_s: float) -> None:
        """Take no more requests, let those that there are end by themselves for a while, then end the rest.

        Returns when every request has had its last event. `close` is still to be called.
        """
        with self._lock:
            self._draining = True
            if self._emptied.wait_for(lambda: not self._unfinished, timeout=grace_s):
                return
        self._inbox.put(partial(self._ledger.finish_all, "the engine is shutting down"))
        with self._lock:
            self._emptied.wait_for(lambda: not self._unfinished or self._broken, timeout=self.config.step_timeout_s)

    def close(self) -> None:
        """End the loop. Requests that have not ended are cancelled, each with its last event."""
        with self._lock:
            self._closed = True
        self._inbox.put(self._end)
        self._thread.join()
        self._monitor.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self, *, for_request: bool = False) -> None:
        """Raise if the engine takes no more requests, of which one is turned away if this is `for_request`."""
        if self._broken:
            raise EngineError("the engine has broken down, its log says why; restart it")
        if self._closed or self._draining:
            self._recorder.rejected[RejectReason.DRAINING] += for_request
            raise OverloadedError(
                "the engine is shutting down and takes no new requests", retry_after_s=CLOSING_RETRY_S
            )

    def _check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise InvalidArgumentError unless the model can compute the request."""
        limit, vocab = self._model.max_model_len, self._model.vocab_size
        if not 1 <= len(prompt) < limit:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt):,} tokens; it takes 1 to {limit - 1:,} (max_model_len = {limit:,})"
            )
        prompted = int(prompt.token_ids.min()), int(prompt.token_ids.max())
        for token in (*prompted, *params.stop_token_ids, *params.logit_bias):
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
            self._model = load_model(self.config, self._wake)
            self._prepare()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(self._model)
        try:
            self._loop()
        except Exception as error:
            _log.exception("the engine's loop failed, by its books or its device; it ends, and so does every request")
            self._break_down(error)
        finally:
            self._model.mover.close(persist_s=0.0 if self._broken else _PERSIST_S)

    def _prepare(self) -> None:
        """Make what the loop works with, over a model that is loaded."""
        try:
            self._step_time = StepTimeModel()
            self._lead = Lead(self._step_time)
            self._scheduler = Scheduler(self._model.blocks, SchedulerLimits.of(self.config), self._step_time)
            self._ledger = RequestLedger(self._scheduler, self._recorder, self.config, self._one_ended)
            self._emitter = Emitter(self._ledger, self._scheduler.advance)
            bounded = self.config.kv_budget_tokens is not None  # Then a step's tokens do not all see the same keys.
            self._speculator = Speculator(0 if bounded else self.config.max_guessed_tokens)
            self._monitor = HealthMonitor(step_timeout_s=self.config.step_timeout_s)
            self._grammars = GrammarCompiler(
                self._model.processor.tokenizer,
                vocab_size=self._model.vocab_size,
                eos_token_ids=self._model.eos_token_ids,
            )
        except BaseException:
            self._model.mover.close(persist_s=0.0)
            raise

    def _one_ended(self, request: Request) -> None:
        self._model.runner.forget(request)
        with self._lock:
            self._unfinished -= 1
            self._emptied.notify_all()

    def _wake(self) -> None:
        """Have the loop look around. On any thread."""
        self._inbox.put(lambda: None)

    def _loop(self) -> None:
        while not self._ended:
            self._await_device()
            self._take_inbox()
            self._ledger.expire(time.monotonic())
            self._recorder.queued(self._scheduler.backlogs())
            if self._scheduler.has_work and not (self._untold and self._scheduler.only_ending):
                self._step()
            elif self._untold:
                self._monitor.step_begins()
                self._tell()
                self._monitor.step_ends()
            elif not self._ended:
                self._idle()

    def _await_device(self) -> None:
        """Take what comes while the device is busy, until it soon needs its next step."""
        untold = self._untold
        if untold is None:
            return
        plan_at = max(untold.launched, self._done) + self._lead.wait_s(untold.plan)
        while (left := plan_at - time.monotonic()) > 0 and not (self._ended or untold.computed.over()):
            with suppress(Empty):
                self._inbox.get(timeout=min(left, _GLANCE_S))()

    def _take_inbox(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _add(self, job: Job) -> None:
        self._ledger.add(job)
        # One that was turned away shows nothing.
        if job.request.prompt.images and self._model.overlaps and job.generations[0].sequence in self._ledger:
            self._foresee(job)

    def _foresee(self, job: Job) -> None:
        """Have the pictures that a new request will show encoded beside the steps for which it waits."""
        try:
            self._model.runner.foresee(job.request, self._scheduler.kept(job.generations[0].sequence))
        except Exception:
            _log.exception("the pictures of %s were not encoded ahead; its own step does it", job.request.id)

    def _idle(self) -> None:
        """Wait for something to do, and if nothing comes soon prove the books, and that the engine can compute."""
        self._model.mover.tend()
        self._model.blocks.tend(time.monotonic())
        with suppress(Empty):
            self._inbox.get(timeout=_IDLE_CHECK_S)()
            return
        self._scheduler.check_integrity()
        if self._monitor.in_trouble:
            self._probe()
            return
        self._when_idle()
        self._inbox.get()()

    def _probe(self) -> None:
        """See whether the engine can compute again: who is told to stay away will not come to show it."""
        try:
            compute_for_nobody(self._model)
            self._monitor.recovered()
        except Exception as error:
            self._monitor.trouble(f"the engine cannot compute: {error}")

    def _step(self) -> None:
        self._monitor.step_begins()
        began = time.monotonic()
        guessing = self._speculator.wants(self._scheduler.num_decoding, self._scheduler.keys_read)
        if guessing:
            self._tell()  # What is guessed follows from tokens that are known.
        plan = self._scheduler.plan(began, self._speculator.guess if guessing else None)
        self._model.mover.move()
        if plan:
            self._ledger.note_start((*plan.decodes, *(chunk.sequence for chunk in plan.chunks)), began)
            self._compute(plan, began, guessing=guessing)
        elif self._untold:
            self._tell()
        self._monitor.step_ends()
        if not plan:
            with suppress(Empty):
                self._inbox.get(timeout=_EMPTY_STEP_S)()

    def _compute(self, plan: StepPlan, began: float, *, guessing: bool) -> None:
        """Compute a step, and tell the tokens of the one before while the device is at it; or at once its own."""
        before = None if self._untold is None else self._untold.choice
        try:
            computed = compute(self._model.runner, plan, None if before is None else before.tokens)
        except StepFailedError as error:
            self._tell()
            self._start_anew(error)
            return
        self._recorder.retried += computed.retried
        launched = time.monotonic()
        if self._untold:
            in_time = not self._untold.computed.over()
            self._tell()
            if not plan.chunks:  # To launch those takes longer than the device takes to begin with them.
                self._lead.observe(self._done - launched if in_time else 0.0)
            computed.leave_out(lambda sequence: sequence not in self._ledger)
        choice = self._complete(computed, began)
        self._untold = _Untold(computed.plan, began, launched, computed, choice, guessing)
        if not self._model.overlaps or plan.guesses:
            self._tell()
        self._model.blocks.tend(time.monotonic())

    def _complete(self, computed: Computed, began: float) -> Choice | None:
        """Note what has been computed, and have the next tokens chosen."""
        forks = self._scheduler.complete(computed.plan)
        self._ledger.note_start((fork.sequence for fork in forks), began)
        choice = None
        if computed.ready:
            rows = computed.ready | {fork.sequence: computed.ready[fork.source] for fork in forks}
            assert computed.logits is not None
            choice = self._emitter.choose(rows, computed.logits, computed.after)
        for sequence, fault in computed.failed.items():
            self._ledger.fail(sequence, fault)
        return choice

    def _tell(self) -> None:
        """Tell what the latest step gave, if that has not been told, and learn from the step."""
        untold, self._untold = self._untold, None
        if untold is None:
            return
        self._wait_for(untold.computed)
        self._done = time.monotonic()
        self._take_prompt_logprobs(untold.computed)
        told: dict[Sequence, int] = {}
        if untold.choice is not None:
            told = self._emitter.tell(untold.choice, untold.plan.guesses)
        now = time.monotonic()
        seconds, self._told = now - max(untold.began, self._told), now
        if untold.guessing and untold.computed.retried:
            self._speculator.rest(len(untold.plan.decodes), untold.plan.shape.keys_read)
        usual = seconds > 0 and not untold.computed.retried
        self._learn(untold.plan, seconds, usual=usual and not untold.plan.guesses)
        if usual and untold.plan.decodes and not untold.plan.chunks:
            self._learn_guessing(untold, told, seconds)

    def _take_prompt_logprobs(self, computed: Computed) -> None:
        for sequence, read in computed.prompt_logprobs.items():
            if sequence in self._ledger:
                try:
                    self._ledger.owner(sequence)[1].take_prompt_logprobs(read())
                except Exception as fault:
                    _log.exception("the log-probabilities of a prompt failed")
                    self._ledger.fail(sequence, fault)

    def _wait_for(self, computed: Computed) -> None:
        """Wait until a step has been computed, and take note of where its attention fell."""
        try:
            computed.done()
        except Exception as error:
            _log.exception("the device failed in a step")
            self._monitor.trouble(f"the device failed in a step ({error}), and has not computed one since")
            return
        self._monitor.recovered()
        try:
            masses = computed.mass()
        except Exception:
            _log.exception("where attention fell in a step cannot be told")
            return
        for sequence, mass in masses.items():
            if sequence.blocks is not None:
                sequence.blocks.attended(mass)

    def _learn(self, plan: StepPlan, seconds: float, *, usual: bool) -> None:
        self._recorder.step(plan, seconds, self._step_time)
        if usual:
            self._step_time.observe(plan.shape, seconds)

    def _learn_guessing(self, untold: _Untold, told: Mapping[Sequence, int], seconds: float) -> None:
        for sequence, guessed in untold.plan.guesses.items():
            right = max(0, told.get(sequence, 0) - 1)
            self._speculator.learn(sequence, right=right, guessed=len(guessed))
        self._speculator.observe(
            decodes=len(untold.plan.decodes),
            keys=untold.plan.shape.keys_read,
            tokens=sum(told.values()),
            seconds=seconds,
            guessing=untold.guessing,
        )

    def _end(self) -> None:
        self._ledger.finish_all("the engine is closing")
        self._ended = True

    def _break_down(self, error: Exception) -> None:
        """End every request without touching the books, and take no more."""
        with self._lock:
            self._closed = self._broken = True
        message = f"the engine broke down: {error}; restart it"
        while not self._inbox.empty():
            with suppress(Exception):  # Requests on their way in, to end with the others, or on their way out.
                self._inbox.get_nowait()()
        self._ledger.abandon_all(EngineError(message))

    def _start_anew(self, error: StepFailedError) -> None:
        """Nothing can be computed, and nobody is known to be at fault: end who ran, and clear the pools."""
        _log.error(
            "no part of a step could be computed (%s); the requests that ran end, the KV pools are cleared", error
        )
        self._monitor.trouble(f"a step failed ({error}), and the engine has not computed one since")
        self._recorder.restarts += 1
        for sequence in self._scheduler.running:
            self._ledger.fail(sequence, error)
        self._scheduler.forget_cache()
        self._model.blocks.take_transfers()
        self._model.pools.clear()


def _is_many(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts: not a text, nor one prompt's chat messages or token ids."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], Mapping | int | np.integer)
