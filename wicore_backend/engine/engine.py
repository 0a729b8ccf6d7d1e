"""The engine: one loop on one thread that owns all state, one step at a time.

    take new and cancelled requests -> expire -> schedule -> run -> sample -> emit

Where the device computes beside the host (CUDA), a step is scheduled and given to it before the tokens of the one
before have been read: those are told while the device computes. A sequence that ends with such a token has then been
decoded once in vain, and nobody hears of it. That next step is scheduled just before the device needs it, so that who
comes while it computes is in it.

Other threads reach the loop through one queue (`inbox.py`), and hear from it through each request's sink.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self

import torch

from wicore_backend.config import EngineConfig
from wicore_backend.engine.computation import Computed, StepFailedError, compute
from wicore_backend.engine.emission import Choice, Emitter
from wicore_backend.engine.explain import CachedPrompt, CacheQuestion
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.health import Health, HealthMonitor
from wicore_backend.engine.in_process import Images, InProcess
from wicore_backend.engine.inbox import Doors, Inbox
from wicore_backend.engine.intake import Intake
from wicore_backend.engine.job import Job
from wicore_backend.engine.lead import Lead
from wicore_backend.engine.learning import StepLearner
from wicore_backend.engine.ledger import RequestLedger
from wicore_backend.engine.loading import LoadedModel, load_model
from wicore_backend.engine.plan import SchedulerLimits, StepPlan
from wicore_backend.engine.probe import probe
from wicore_backend.engine.request import Deadlines, PriorityClass, Request, Retention, Sequence, Sink
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.speculation import Speculator
from wicore_backend.engine.statistics import EngineStatistics, StatisticsRecorder
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.engine.untold import UntoldStep
from wicore_backend.errors import EngineError
from wicore_backend.hmt.names import BlockNames
from wicore_backend.processor.processor import PromptSource
from wicore_backend.processor.prompt import Prompt

_log = logging.getLogger(__name__)

_IDLE_CHECK_S = 1.0
"""After this long without work the loop proves its books."""

_EMPTY_STEP_S = 0.001
"""Longest pause after a plan of nothing, which means that everybody waits for memory, or for blocks from the disk."""

_GLANCE_S = 0.002
"""While the device computes, the loop looks after so long whether it is done before its time."""

_PERSIST_S = 4.0
"""How long an engine that ends may take to store what it has cached. A server gives its models 8 s for everything."""


class Engine:
    """Gemma-3 on one device.

    Loads the model and starts the loop's thread; `close`, or leaving the `with` block, ends both.

    Parameters
    ----------
    when_idle
        Called on the loop's thread when there has been nothing to do for a while, once until there is again.

    Attributes
    ----------
    processor
        Makes prompts of text, messages and pictures.
    generate, stream
        Whole answers, and events as they come, for callers in this process: see `InProcess`.

    Raises
    ------
    InvalidArgumentError
        For settings that contradict each other or the model (`CheckpointError` for a bad model directory).
    """

    def __init__(self, config: EngineConfig, *, when_idle: Callable[[], object] = lambda: None) -> None:
        self.config = config
        self._when_idle = when_idle
        self._recorder = StatisticsRecorder()
        self._inbox = Inbox(self._recorder)
        self._untold: UntoldStep | None = None
        self._ended = False  # Every request has had its last event.
        loaded: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="wicore-engine", daemon=True)
        self._thread.start()
        self._model = loaded.result()
        self.processor = self._model.processor
        in_process = InProcess(self.processor, submit=self.submit, cancel=self.cancel)
        self.generate, self.stream = in_process.generate, in_process.stream

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
        params = self._intake.checked(prompt, params)
        self._inbox.check()  # Before a grammar is compiled for nobody, which a stop would wait for.
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
        job = self._intake.job(request)
        self._inbox.admit(partial(self._add, job))
        return request.id

    def has_compiled(self, grammar: Grammar | None) -> bool:
        """Whether `submit` of a request with this grammar takes no longer than without one."""
        return self._intake.has_compiled(grammar)

    def compile(self, grammar: Grammar | None) -> None:
        """Have a grammar compiled, so that `submit` does not wait for it; raises what `submit` would."""
        self._inbox.check()
        self._intake.compile(grammar)

    def cancel(self, request_id: str) -> None:
        """End a request, waiting or running, within one step. An id that is unknown, or ended, is no error."""
        self._inbox.put(partial(self._ledger.cancel, request_id))

    def statistics(self) -> EngineStatistics:
        """The engine's numbers at this moment."""
        return self._recorder.snapshot(
            self._model.executor,
            self._scheduler,
            self._model.blocks,
            now=time.monotonic(),
            unfinished=self._inbox.unfinished,
        )

    def explain_cache(
        self, prompt: PromptSource, *, images: Images | None = None, raw: bool = False, tenant: str = ""
    ) -> CachedPrompt:
        """Where the blocks of a prompt, given as for `generate`, are at this moment. Not to be called from a sink."""
        processed = self.processor.process(prompt, images=images or (), raw=raw)
        blocks, lower = self._model.blocks, self._model.blocks.lower
        names = BlockNames(self._model.name_scheme, processed.token_ids.tolist(), processed.images, tenant)
        question = CacheQuestion(blocks, names, len(processed), None if lower is None else lower.host.explain)
        self._inbox.ask(question.answer)
        return question.result()

    def health(self) -> Health:
        """Whether new requests are in good hands here."""
        match self._inbox.doors:
            case Doors.OPEN:
                return self._monitor.health()
            case Doors.SHUT:
                return Health(False, "the engine is draining")
            case Doors.BROKEN:
                return Health(False, "the engine has broken down; its log says why")

    def drain(self, grace_s: float) -> None:
        """Take no more requests, let those that there are end by themselves for a while, then end the rest.

        Returns when every request has had its last event. `close` is still to be called.
        """
        self._inbox.shut()
        if not self._inbox.wait_until_all_left(grace_s):
            self._inbox.put(partial(self._ledger.finish_all, "the engine is shutting down"))
            self._inbox.wait_until_all_left(self.config.step_timeout_s)

    def close(self) -> None:
        """End the loop. Requests that have not ended are cancelled, each with its last event."""
        self._inbox.shut()
        self._inbox.put(self._end)
        self._thread.join()
        self._monitor.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What runs on the loop's thread.

    @torch.inference_mode()
    def _run(self, loaded: Future[LoadedModel]) -> None:
        # The model is loaded here, since each thread that computes has its own pool of OpenMP threads: with a second
        # pool there are more threads than cores, their waits turn into sleeps, and a CPU's decode step takes 1.5 times.
        try:
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            self._model = load_model(self.config, self._inbox.wake)
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
            self._model.mover.close(persist_s=0.0 if self._inbox.doors is Doors.BROKEN else _PERSIST_S)

    def _prepare(self) -> None:
        """Make what the loop works with, over a model that is loaded."""
        try:
            self._intake = Intake(self._model, prefix_cache=self.config.prefix_cache)
            step_time = StepTimeModel()
            self._lead = Lead(step_time)
            bounded = self.config.kv_budget_tokens is not None  # Then a step's tokens do not all see the same keys.
            self._speculator = Speculator(0 if bounded else self.config.max_guessed_tokens)
            self._learner = StepLearner(self._recorder, step_time, self._speculator)
            self._scheduler = Scheduler(self._model.blocks, SchedulerLimits.of(self.config), step_time)
            self._ledger = RequestLedger(self._scheduler, self._recorder, self.config, self._one_ended)
            self._emitter = Emitter(self._ledger, self._scheduler.advance)
            self._monitor = HealthMonitor(step_timeout_s=self.config.step_timeout_s)
        except BaseException:
            self._model.mover.close(persist_s=0.0)
            raise

    def _loop(self) -> None:
        while not self._ended:
            self._await_device()
            self._inbox.take_all()
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
        plan_at = self._lead.plan_at(untold.plan, untold.launched)
        while (left := plan_at - time.monotonic()) > 0 and not (self._ended or untold.computed.over()):
            self._inbox.take_one(timeout_s=min(left, _GLANCE_S))

    def _add(self, job: Job) -> None:
        """Take a request over, and have the pictures that it will show encoded beside the steps for which it waits."""
        self._ledger.add(job)
        request, first = job.request, job.generations[0].sequence
        if not (request.prompt.images and self._model.overlaps and first in self._ledger):
            return  # One that was turned away shows nothing.
        try:
            self._model.runner.foresee(request, self._scheduler.kept(first))
        except Exception:
            _log.exception("the pictures of %s were not encoded ahead; its own step does it", request.id)

    def _one_ended(self, request: Request) -> None:
        self._model.runner.forget(request)
        self._inbox.leave()

    def _idle(self) -> None:
        """Wait for something to do, and if nothing comes soon prove the books, and that the engine can compute."""
        self._model.mover.tend()
        self._model.blocks.tend(time.monotonic())
        if self._inbox.take_one(timeout_s=_IDLE_CHECK_S):
            return
        self._scheduler.check_integrity()
        if self._monitor.in_trouble:
            probe(self._model, self._monitor)
        else:
            self._when_idle()
            self._inbox.take_one()

    def _step(self) -> None:
        """Schedule a step and have it computed, or tell what the one before gave if there is none."""
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
        else:
            self._tell()
        self._monitor.step_ends()
        if not plan:
            self._inbox.take_one(timeout_s=_EMPTY_STEP_S)

    def _compute(self, plan: StepPlan, began: float, *, guessing: bool) -> None:
        """Compute a step, and tell the tokens of the one before while the device is at it; or at once its own."""
        before = self._untold
        ahead = None if before is None or before.choice is None else before.choice.tokens
        try:
            computed = compute(self._model.runner, plan, ahead)
        except StepFailedError as error:
            self._tell()
            self._start_anew(error)
            return
        self._recorder.retried += computed.retried
        launched = time.monotonic()
        if before is not None:
            in_time = not before.computed.over()
            self._tell()
            if not plan.chunks:  # To launch those takes longer than the device takes to begin with them.
                self._lead.followed(launched, in_time=in_time)
            computed.leave_out(lambda sequence: sequence not in self._ledger)
        choice = self._complete(computed, began)
        self._untold = UntoldStep(computed.plan, began, launched, computed, choice, guessing)
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
        untold.wait(self._monitor)
        self._lead.device_done(time.monotonic())
        self._emitter.take_prompt_logprobs(untold.computed.prompt_logprobs)
        told: Mapping[Sequence, int] = {}
        if untold.choice is not None:
            told = self._emitter.tell(untold.choice, untold.plan.guesses)
        self._learner.learn(untold, told, time.monotonic())

    def _end(self) -> None:
        self._ledger.finish_all("the engine is closing")
        self._ended = True

    def _break_down(self, error: Exception) -> None:
        """End every request without touching the books, and take no more."""
        self._inbox.break_down()
        self._ledger.abandon_all(EngineError(f"the engine broke down: {error}; restart it"))

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
