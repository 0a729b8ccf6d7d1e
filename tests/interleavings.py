"""What can happen to requests, in any order, and what must hold after all of it.

The engine is the real one (`tests/hand_turned.py`), over a model that checks what each step reads
(`tests/hash_model.py`). After every operation the books prove themselves; in the end nothing is held, and every caller
has heard what he should (`tests/callers.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.callers import Caller, prompt_of
from tests.hand_turned import G, HandTurnedEngine, L, Setting, hand_turned
from tests.hash_model import CONTEXT, TALLY, Clock
from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.request import Deadlines, PriorityClass, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.processor.prompt import Prompt

SETTINGS = st.builds(
    Setting,
    groups=st.sampled_from([(L, L, G), (L, L, G), (L, G), (G,), (L,)]),
    block_size=st.sampled_from([4, 3, 2, 1]),
    window=st.sampled_from([7, 8, 4, 13, 2]),
    running=st.sampled_from([4, 3, 6, 2, 1]),
    spare_tokens=st.sampled_from([0, 3, 10, 40]),
    spare_blocks=st.sampled_from([0, 4, 10, 40]),
    host_slots=st.sampled_from([40, 0, 12, 100]),
    cold=st.sampled_from([None, 100, 5, 1]),
    waiting=st.sampled_from([100, 100, 12, 4]),
    waiting_tokens=st.sampled_from([10_000, 10_000, 400, 150]),
    ageing_s=st.sampled_from([0.02, 30.0, 0.0]),
    target_ms=st.sampled_from([None, None, 3.0]),
    prefix_cache=st.sampled_from([True, True, True, False]),
    expected_answer=st.sampled_from([1, 3, None]),
    taught=st.booleans(),
    overlaps=st.booleans(),
    policy=st.sampled_from([None, "lfu", "a2cr", "s3fifo"]),
    guesses=st.booleans(),
)

PROMPTS = st.builds(
    prompt_of,
    stream=st.integers(0, 2),
    length=st.sampled_from([8, 16, 24, 13, 23, 30, 37, 48, 1]),
    picture=st.sampled_from([0, 0, 0, 1]),
    tail=st.integers(0, 3),
)


def params_of(tokens: int, hot: bool, seed: int, answers: tuple[int, int | None], logprobs: bool, eos: bool):
    return SamplingParams(
        max_tokens=tokens,
        temperature=3.0 if hot else 0.0,
        seed=seed,
        n=answers[0],
        best_of=answers[1],
        prompt_logprobs=1 if logprobs else None,
        ignore_eos=not eos,
    )


PARAMS = st.builds(
    params_of,
    tokens=st.sampled_from([8, 1, 3, 16, 40]),
    hot=st.booleans(),
    seed=st.integers(0, 2),
    answers=st.sampled_from([(1, None), (1, None), (1, None), (3, None), (1, 3), (2, 4)]),
    logprobs=st.sampled_from([False, False, False, False, True]),
    eos=st.booleans(),
)

SOON = st.sampled_from([None, None, None, 0.004, 0.02, 0.2])
DEADLINES = st.one_of(st.just(Deadlines()), st.builds(Deadlines, queue_s=SOON, first_token_s=SOON, total_s=SOON))
WHICH = st.integers(0, 1000)
LOGGER = logging.getLogger("wicore_backend.engine")


class Interleaving(RuleBasedStateMachine):
    """One of the interleavings."""

    engine: HandTurnedEngine

    @initialize(setting=SETTINGS)
    def set_up(self, setting: Setting) -> None:
        self.clock = Clock()
        self.patches = ExitStack()
        for module in ("engine", "ledger", "emission"):
            self.patches.enter_context(mock.patch(f"wicore_backend.engine.{module}.time", self.clock))
        LOGGER.setLevel(logging.CRITICAL)  # It tells of every fault.
        self.engine, self.runner = hand_turned(setting, self.clock)
        self.pace = setting.cold or 0
        self.callers: list[Caller] = []
        TALLY["interleavings"] += 1

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        priority=st.sampled_from(PriorityClass),
        tenant=st.sampled_from(["", "", "", "b"]),
        deadlines=DEADLINES,
        late=st.sampled_from([0.0, 0.0, 0.003]),
        raises=st.sampled_from([False] * 7 + [True]),
        copies=st.sampled_from([1, 1, 2, 3]),
    )
    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        tenant: str,
        deadlines: Deadlines,
        late: float,
        raises: bool,
        copies: int,
    ) -> None:
        for _ in range(copies):
            caller = Caller(prompt, params, deadlines, raises, tenant)
            self._submit(caller, priority=priority, arrival=self.clock.now - late)

    @precondition(lambda self: self._live)
    @rule(which=WHICH)
    def submit_an_id_again(self, which: int) -> None:
        live = self._live
        caller = Caller(prompt_of(0, 8, 0, 0), SamplingParams(seed=0), Deadlines(), False, twice=True)
        self._submit(caller, request_id=live[which % len(live)].id)

    @precondition(lambda self: any(c.last and any(c.answers()) for c in self.callers))
    @rule(which=WHICH, params=PARAMS, more=st.integers(0, 6))
    def submit_a_second_turn(self, which: int, params: SamplingParams, more: int) -> None:
        first = [c for c in self.callers if c.last and any(c.answers())]
        chosen = first[which % len(first)]
        tokens = [*chosen.prompt.token_ids.tolist(), *next(filter(None, chosen.answers())), *range(2, 2 + more)]
        if len(tokens) < CONTEXT:
            TALLY["second turns"] += 1
            prompt = Prompt(np.array(tokens, np.int32), chosen.prompt.images)
            self._submit(Caller(prompt, params, Deadlines(), False, chosen.tenant))

    def _submit(self, caller: Caller, **how: Any) -> None:
        self.callers.append(caller)
        caller.id = how.pop("request_id", f"r{len(self.callers)}")
        self.engine.submit(
            caller.prompt,
            caller.params,
            sink=caller.sink,
            request_id=caller.id,
            tenant=caller.tenant,
            deadlines=caller.deadlines,
            **how,
        )
        TALLY["requests"] += 1

    @rule(count=st.sampled_from([1, 1, 2, 4, 12]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._turn()

    @precondition(lambda self: self._live)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        live = self._live
        self.engine.cancel(live[which % len(live)].id)
        self.engine._inbox.take_all()
        TALLY["cancels"] += 1

    @precondition(lambda self: self._live)
    @rule(seconds=st.sampled_from([0.002, 0.01, 0.1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.engine._ledger.expire(self.clock.now)

    @precondition(lambda self: self.engine.disk is not None)
    @rule(
        failing=st.sampled_from([0, 1, 3, 100]),
        seconds=st.sampled_from([None, 0.0, 0.001, 10.0]),
    )
    def the_disk_is_another(self, failing: int, seconds: float | None) -> None:
        assert self.engine.disk is not None
        self.engine.disk.move(failing, failing=True)
        self.engine.disk.seconds = seconds

    @precondition(lambda self: self.engine.disk is not None)
    @rule(rounds=st.sampled_from([1, 3, 10]))
    def write_behind(self, rounds: int) -> None:
        """As an idle engine does, and here also with work to do."""
        assert self.engine.disk is not None
        for _ in range(rounds):
            self.engine.disk.move(self.pace)
            self.engine._model.mover.tend()

    @precondition(lambda self: self.engine._scheduler.num_running)
    @rule(which=WHICH)
    def preempt(self, which: int) -> None:
        running = self.engine._scheduler.running
        self.engine._scheduler.preempt(running[which % len(running)])
        TALLY["preemptions, forced"] += 1

    @precondition(lambda self: self._live)
    @rule(which=WHICH, fault=st.sampled_from(["once", "culprit", "token", "once", "culprit", "once", "all", "doubt"]))
    def fail(self, which: int, fault: str) -> None:
        running = self.engine._scheduler.running
        if fault == "once":
            runs: list[StepPlan] = []
            self._turn_broken(lambda plan: runs.append(plan) or len(runs) == 1)  # type: ignore[func-returns-value]
        elif fault == "all":
            self._turn_broken(lambda _: True)
        elif fault == "doubt":
            self.engine._scheduler.forget_cache()
            self.engine._model.pools.clear()
            TALLY["caches forgotten"] += 1
        elif running:
            self._fail_one(running[which % len(running)], token=fault == "token")

    def _fail_one(self, culprit: Sequence, *, token: bool) -> None:
        """A step that cannot compute one sequence, or computes a token that cannot be taken."""
        _, generation = self.engine._ledger.owner(culprit)
        self.engine.blamed.add(culprit.request.id)
        if token:
            with mock.patch.object(generation, "push", side_effect=RuntimeError("no such character")):
                self._turn()
            TALLY["tokens that could not be taken"] += 1
        else:
            self._turn_broken(lambda plan: culprit in [*plan.decodes, *(c.sequence for c in plan.chunks)])
            TALLY["steps with a culprit"] += 1

    @precondition(lambda self: len(self._live) > 4)
    @rule(really=st.sampled_from([False, False, False, True]))
    def end_all(self, really: bool) -> None:
        if really:
            self.engine._ledger.finish_all("the engine is shutting down")
            TALLY["all ended at once"] += 1

    def _turn_broken(self, broken: Callable[[StepPlan], bool]) -> None:
        self.runner.broken = broken
        self._turn()
        self.runner.broken = lambda _: False

    def _turn(self) -> None:
        if self.engine.disk is not None:
            self.engine.disk.move(self.pace)
        with torch.inference_mode():
            self.engine.turn()

    @property
    def _live(self) -> list[Caller]:
        return [c for c in self.callers if c.last is None]

    @invariant()
    def the_books_are_right(self) -> None:
        assert not self.runner.wrong, self.runner.wrong
        self.engine._scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self._all_end_as_they_should()
        finally:
            self.patches.close()
            LOGGER.setLevel(logging.NOTSET)
            self.engine.close()

    def _all_end_as_they_should(self) -> None:
        engine, scheduler = self.engine, self.engine._scheduler
        self._turn()
        for _ in range(100 + 70 * len(self.callers)):
            if not scheduler.has_work:
                break
            self._turn()
        assert not self.runner.wrong, self.runner.wrong
        assert not scheduler.has_work, "it does not end"
        scheduler.check_integrity()
        for group, pool in engine._model.blocks.pools.items():
            assert pool.active == 0
            TALLY[f"{group} blocks recycled"] += pool.recycled
        assert not engine._ledger._jobs
        assert not engine._ledger._owners
        assert engine._inbox.unfinished == 0
        assert not scheduler._lobby.twins.leaders
        assert sum(engine._recorder.requests.values()) == len(self.callers)
        for caller in self.callers:
            caller.check(blamed=caller.id in engine.blamed)
        self._count()

    def _count(self) -> None:
        counts = self.engine._scheduler.counts
        TALLY["preemptions"] += counts.preemptions
        statistics = self.engine.statistics()
        for tier, tokens in statistics.hit_tokens.items():
            assert tokens >= 0
            TALLY[f"prompt tokens found in the cache, {tier}"] += tokens
        TALLY["blocks written behind"] += sum(usage.counts.written_behind for usage in statistics.host.values())
        TALLY["prompt tokens shared by forks"] += counts.shared_prefill_tokens
        TALLY["prompt tokens whose window alone was missing"] += counts.window_missing_tokens
        TALLY["promotions by age"] += counts.promotions
        TALLY["waits for the cold tier"] += counts.restores
        TALLY["tokens hoped for from the cold tier"] += counts.restored_tokens
        TALLY["blocks moved between host and cold tier"] += self.engine.disk.moved if self.engine.disk else 0
        TALLY["steps retried"] += self.engine._recorder.retried
        TALLY["restarts of the pools"] += self.engine._recorder.restarts
        for reason, count in self.engine._recorder.rejected.items():
            TALLY[f"rejected: {reason}"] += count
