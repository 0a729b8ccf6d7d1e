"""Any interleaving of what can happen to requests leaves the books balanced and every answer as if nothing had.

The engine is the real one, its loop turned by hand on a clock that only steps and rules move. The model below it is a
fake that makes every mistake of the books visible. A key is the hash of all that a real key depends on: the tokens and
pictures up to it. Memory remembers, for every block of either group, which keys were written where, and each step
checks that each key that its tokens may see is the one that its sequence should have there. The next token is drawn
from logits that follow from that hash, so that answers can be told without an engine.

`scripts/torture_scheduler.py` runs the same machine for longer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Rows
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fake_cold_tier import FakeColdTier
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.computation import StepFailedError
from wicore_backend.engine.health import HealthMonitor
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import (
    Deadlines,
    Event,
    FinishedEvent,
    FinishReason,
    PriorityClass,
    Request,
    Sequence,
    TokensEvent,
)
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.sampler import SamplingRow, sample
from wicore_backend.engine.speculation import Speculator, may_be_guessed
from wicore_backend.engine.statistics import ExecutorInUse
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.engine.tiers import BlockMover
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import NameScheme
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.transfers import Route, Transfer
from wicore_backend.processor.prompt import Prompt, PromptImage

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL
CONTEXT, VOCAB, IMAGE, EOS = 64, 24, 5, 1
NO_PIXELS = np.zeros((3, 1, 1), np.uint8)
LOGITS = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (997, VOCAB)).astype(np.float32))
STREAMS = np.random.default_rng(1).integers(2, VOCAB, (3, 48)).tolist()
"""What prompts begin with, so that many share a part."""
PICTURES = ((), (6,), (3, 8, 27))
"""Where each stream shows pictures; two of them side by side."""

TALLY: Counter[str] = Counter()
"""What happened, over all interleavings."""


# The fake model


def keys_of(tokens: Rows[int], images: Iterable[PromptImage], tenant: str, keys: list[int]) -> list[int]:
    """Extend `keys`, those of the first tokens, to all of them. A picture's tokens see each other.

    Each tenant has keys of its own, so that a block that two of them share is noticed.
    """
    pictures = {image.start: image for image in images}
    while len(keys) < len(tokens):
        place, before = len(keys), keys[-1] if keys else len(tenant)
        if image := pictures.get(place):
            seen = hash((before, image.digest[0], *tokens[place : image.end]))
            keys += [hash((seen, offset)) for offset in range(image.length)]
        else:
            keys.append(hash((before, tokens[place])))
    return keys


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Memory:
    """Stands in for the KV pools: the key at each offset of each block, None where there is none."""

    def __init__(self, layout: KVLayout, blocks: dict[LayerGroup, int], slots: int) -> None:
        self._size = layout.block_size
        self.host: dict[LayerGroup, list[list[int | None]]] = {g: [[] for _ in range(slots)] for g in layout.groups}
        self.keys: dict[LayerGroup, list[list[int | None]]] = {g: [[] for _ in range(blocks[g])] for g in layout.groups}
        self.clear()

    def apply(self, transfers: Iterable[Transfer]) -> None:
        ends = {
            Route.WITHIN_DEVICE: (self.keys, self.keys),
            Route.DEVICE_TO_HOST: (self.keys, self.host),
            Route.HOST_TO_DEVICE: (self.host, self.keys),
        }
        for transfer in transfers:
            TALLY[f"blocks copied {transfer.route.name.lower().replace('_', ' ')}"] += 1
            source, target = ends[transfer.route]
            target[transfer.group][transfer.target] = list(source[transfer.group][transfer.source])

    def clear(self) -> None:
        for blocks in self.keys.values():
            blocks[:] = [[None] * self._size for _ in blocks]

    def close(self) -> None:
        """There is nothing to give back."""


class Runner:
    """Stands in for the model. What it finds wrong goes into `wrong`: the engine would take an error for a fault."""

    def __init__(self, layout: KVLayout, memory: Memory, clock: Clock, *, max_tokens: int) -> None:
        self._layout, self._memory, self._clock, self._max_tokens = layout, memory, clock, max_tokens
        self._keys: dict[Sequence, list[int]] = {}
        self.wrong: list[str] = []
        self.broken: Callable[[StepPlan], bool] = lambda _: False
        self.meanwhile: Callable[[], None] = lambda: None

    def foresee(self, request: Request, computed: int) -> None:
        """Pictures are encoded with their step here."""
        del request, computed

    def forget(self, request: Request) -> None:
        """Nothing is encoded ahead."""
        del request

    def run(self, plan: StepPlan, ahead: torch.Tensor | None = None) -> StepOutput:
        self._ahead = ahead
        self._guesses = plan.guesses
        self._expect(not (plan.guesses and plan.chunks), "prompts beside guesses")
        chunks = plan.parts
        lengths = [c.end - c.start for c in chunks]
        self._clock.now += 0.001 + 0.0001 * sum(lengths)
        self.meanwhile()
        self._check_plan(chunks)
        broken = self.broken(plan)
        for chunk in chunks:
            self._write(chunk, garbage=broken)
        if broken:
            TALLY["runs of the model that failed"] += 1
            raise RuntimeError("the device is on fire")
        for chunk in chunks:
            self._check_visible(chunk)
        rows = [key % len(LOGITS) for c in chunks for key in self._keys_of(c.sequence)[c.start : c.end]]
        hidden, nothing = torch.tensor(rows), torch.empty(0)
        executor: Any = SimpleNamespace(last=lambda hidden, _, index: LOGITS[hidden[index]])
        return StepOutput(executor, hidden, nothing, tuple(np.cumsum([0, *lengths]).tolist()))

    def _keys_of(self, sequence: Sequence) -> list[int]:
        keys = self._keys.setdefault(sequence, [])
        tokens = sequence.tokens
        if sequence.ahead is not None:
            assert self._ahead is not None
            tokens = [*tokens, int(self._ahead[sequence.ahead])]
        if guess := self._guesses.get(sequence):  # Which may be wrong: their keys are not the sequence's yet.
            tokens, keys = [*tokens, *guess], list(keys)
        return keys_of(tokens, sequence.request.prompt.images, sequence.tenant, keys)

    def _check_plan(self, chunks: list[Chunk]) -> None:
        self._expect(chunks != [], "a step computes nothing")
        self._expect(len({c.sequence for c in chunks}) == len(chunks), "a sequence is twice in a step")
        self._expect(sum(c.end - c.start for c in chunks) <= self._max_tokens, "a step has too many tokens")
        for c in chunks:
            self._expect(c.start == c.sequence.computed, "a chunk does not go on where its sequence stands")
            beyond = c.sequence.uncomputed + len(self._guesses.get(c.sequence, ()))
            self._expect(c.start < c.end <= c.start + beyond, "a chunk is empty, or beyond its sequence")
            for image in c.sequence.request.prompt.images:
                self._expect(not (image.start < c.start < image.end or image.start < c.end < image.end), "a cut image")

    def _write(self, chunk: Chunk, *, garbage: bool) -> None:
        size, keys = self._layout.block_size, self._keys_of(chunk.sequence)
        for group, blocks in self._memory.keys.items():
            table = chunk.sequence.running_blocks.tables[group]
            for place in range(chunk.start, chunk.end):
                blocks[table[place // size]][place % size] = None if garbage else keys[place]

    def _check_visible(self, chunk: Chunk) -> None:
        size, keys = self._layout.block_size, self._keys_of(chunk.sequence)
        for group, blocks in self._memory.keys.items():
            table = chunk.sequence.running_blocks.tables[group]
            first = 0 if group is G else max(0, chunk.start - self._layout.window + 1)
            for index in range(first // size, self._layout.blocks_for(chunk.end)):
                places = slice(max(first, index * size), min(chunk.end, (index + 1) * size))
                there = blocks[table[index]][places.start - index * size : places.stop - index * size]
                self._expect(table[index] != 0, f"no {group} block where there should be one")
                self._expect(there == keys[places], f"a {group} block holds what is not the sequence's")

    def _expect(self, right: bool | np.bool_, said: str) -> None:
        if not right:
            self.wrong.append(said)


@lru_cache(maxsize=2**16)
def next_token(key: int, temperature: float, seed: int, place: int) -> tuple[int, float]:
    """What the model says after the token of this key, and its log-probability."""
    logits = LOGITS[key % len(LOGITS)]
    row = SamplingRow(SamplingParams(temperature=temperature), seed, place)
    token = int(sample(logits[None].clone(), [row]))
    return token, float(logits.log_softmax(-1)[token])


def undisturbed(prompt: Prompt, params: SamplingParams, tenant: str, index: int) -> Answer:
    """The answer that the model gives if nothing else happens."""
    assert params.seed is not None
    stop = {*params.stop_token_ids} | ({EOS} if not params.ignore_eos else set())
    tokens, keys = prompt.token_ids.tolist(), list[int]()
    room = CONTEXT - len(prompt)
    answer = Answer([], FinishReason.LENGTH, 0.0)
    while len(answer.tokens) < min(params.max_tokens or room, room):
        key = keys_of(tokens, prompt.images, tenant, keys)[-1]
        token, logprob = next_token(key, params.temperature, params.seed + index, len(answer.tokens))
        answer.tokens.append(token)
        answer.logprob += logprob
        tokens.append(token)
        if token in stop:
            answer.reason = FinishReason.STOP
            break
    return answer


@dataclass
class Answer:
    tokens: list[int]
    reason: FinishReason
    logprob: float

    @property
    def likelihood(self) -> float:
        return self.logprob / len(self.tokens)


# The engine over it


class Oracle(Speculator):
    """Guesses in most steps, and mostly right."""

    def __init__(self) -> None:
        super().__init__(4)
        self._rng = Random(0)

    def wants(self, decodes: int, keys: int) -> bool:  # noqa: ARG002
        return decodes > 0 and self._rng.random() < 0.7

    def guess(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        most = min(most, self._rng.randrange(5))
        params, request = sequence.request.params, sequence.request
        if most <= 0 or not may_be_guessed(sequence):
            return ()
        assert params.seed is not None
        tokens: list[int] = []
        keys = keys_of(sequence.tokens, request.prompt.images, request.tenant, [])
        while len(tokens) < most:
            place = sequence.answered + len(tokens)
            token, _ = next_token(keys[-1], params.temperature, params.seed + sequence.index, place)
            tokens.append(token if self._rng.random() < 0.7 else self._rng.randrange(VOCAB))
            keys = keys_of([*sequence.tokens, *tokens], request.prompt.images, request.tenant, keys)
        return tuple(tokens)

    def learn(self, sequence: Sequence, *, right: int, guessed: int) -> None:
        assert right <= guessed <= sequence.max_tokens
        TALLY["tokens guessed"] += guessed
        TALLY["tokens guessed right"] += right

    def observe(self, **_: object) -> None:
        """It never learns."""


class HandTurnedEngine(Engine):
    """The engine without its loop: `turn` is one round of it."""

    blamed: set[str]
    """Requests that a fault touches: no other one may end with an error."""
    disk: FakeColdTier | None

    def _loop(self) -> None:
        pass

    def turn(self) -> None:
        self._inbox.take_all()
        self._ledger.expire(self._now)
        now = self._now
        for job in self._ledger._jobs.values():
            total = job.request.deadlines.total_s
            assert total is None or job.request.arrival + total > now, "a request outlives its deadline"
        if self._scheduler.has_work:
            self._step()
            TALLY["steps"] += 1
        elif self._untold:
            self._tell()
        assert self._scheduler.num_running <= self.config.max_running
        self._scheduler.check_integrity()

    def _start_anew(self, error: StepFailedError) -> None:
        self.blamed |= {s.request.id for s in self._scheduler.running}
        super()._start_anew(error)

    @property
    def _now(self) -> float:
        return self._monitor._clock()


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    groups: tuple[LayerGroup, ...]
    block_size: int
    window: int
    running: int
    spare_tokens: int
    """Of a step, beside those that it has to hold."""
    spare_blocks: int
    """Of each pool, beside those that one sequence needs."""
    host_slots: int
    """Of each pool's host tier; 0 is none."""
    cold: int | None
    """How many blocks move each turn between that and a cold tier; None if there is no such tier."""
    waiting: int
    waiting_tokens: int
    ageing_s: float
    target_ms: float | None
    prefix_cache: bool
    expected_answer: int | None
    """What answers have been like, for the scheduler to expect; None leaves it at its first guess."""
    taught: bool
    """Whether the step-time model has learnt the machine already."""
    overlaps: bool = False
    """Whether tokens are read one step late."""
    policy: str | None = None
    """What the device tier gives up by; None is the longest unused."""
    guesses: bool = False
    """Whether steps guess what may follow."""


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


def hand_turned(setting: Setting, clock: Clock) -> tuple[HandTurnedEngine, Runner]:
    """An engine over the fake model."""
    config = EngineConfig(
        model=Path("fake"),
        max_batch_tokens=setting.running + IMAGE + setting.spare_tokens,
        max_running=setting.running,
        max_waiting=setting.waiting,
        max_waiting_tokens=setting.waiting_tokens,
        priority_ageing_s=setting.ageing_s,
        target_tpot_ms=setting.target_ms,
        prefix_cache=setting.prefix_cache,
        block_size=setting.block_size,
        tenant_weights={"b": 2.0},
    )
    chunk = config.max_batch_tokens
    layout = KVLayout.of(
        setting.groups,
        block_size=setting.block_size,
        kv_heads=1,
        head_dim=1,
        window=setting.window,
        bytes_per_value=4,
    )
    num_blocks = {g: 1 + layout.blocks_held(g, CONTEXT, chunk) + setting.spare_blocks for g in layout.groups}
    memory = Memory(layout, num_blocks, setting.host_slots)
    cold = FakeColdTier(memory.host) if setting.cold is not None and setting.host_slots else None
    lower = None
    if setting.host_slots:
        host = HostTier(dict.fromkeys(layout.groups, setting.host_slots), LRU)
        lower = LowerTiers(host, cold, threshold=0.2)
    policy = None if setting.policy is None else POLICIES[setting.policy]
    blocks = BlockManager(layout, num_blocks, max_chunk=chunk, lower=lower, policy=policy)
    runner: Any = Runner(layout, memory, clock, max_tokens=chunk)
    runner.meanwhile = lambda: blocks.tend(clock.now)
    pools: Any = memory
    processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(token_bytes=lambda token: bytes([97 + token])))
    model = LoadedModel(
        runner=runner,
        processor=processor,
        blocks=blocks,
        mover=BlockMover(blocks, pools, None),
        pools=pools,
        name_scheme=NameScheme(setting.block_size),
        max_model_len=CONTEXT,
        vocab_size=VOCAB,
        soft_tokens_per_image=IMAGE,
        eos_token_ids=frozenset([EOS]),
        generation_defaults={},
        executor=ExecutorInUse("fake", "it makes mistakes visible"),
        overlaps=setting.overlaps,
    )
    step_time = StepTimeModel()
    parts: dict[str, Any] = {
        "load_model": lambda *_: model,
        "HealthMonitor": partial(HealthMonitor, clock=clock.monotonic),
        "Speculator": lambda _: Oracle() if setting.guesses else Speculator(0),
        "StepTimeModel": lambda: step_time,
    }
    with mock.patch.multiple("wicore_backend.engine.engine", **parts):
        engine = HandTurnedEngine(config)
    engine.disk = cold
    engine.blamed = set()
    if setting.expected_answer is not None:
        for _ in range(64):
            engine._scheduler._answers.observe(setting.expected_answer)
    if setting.taught:
        for n in range(40):
            shape = StepShape(n % 4 + 1, n % 4 + 1, n % 4 * 20, 0)
            shape = shape.with_prefill(n % 5 * 5, 0) if n % 5 else shape
            step_time.observe(shape, 0.001 + 0.0001 * shape.tokens)
    return engine, runner


@dataclass(eq=False)
class Caller:
    """Who asked, and what he has heard."""

    prompt: Prompt
    params: SamplingParams
    deadlines: Deadlines
    raises: bool
    tenant: str = ""
    id: str = ""
    twice: bool = False
    """Whether its id was another one's."""
    events: list[Event] = field(default_factory=list)

    def sink(self, event: Event) -> None:
        self.events.append(event)
        if self.raises:
            raise ValueError("a sink that fails")

    @property
    def last(self) -> FinishedEvent | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], FinishedEvent) else None

    def answers(self) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(self.params.n)]
        for event in self.events:
            if isinstance(event, TokensEvent):
                answers[event.index] += event.token_ids
        return answers

    def check(self, *, blamed: bool) -> None:
        """The events of a request that has ended are what they should be."""
        last, answers = self.last, self.answers()
        assert last is not None, "no final event"
        assert sum(isinstance(event, FinishedEvent) for event in self.events) == 1, "two final events"
        whole = last.reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert whole == (last.error is None)
        assert last.reason is not FinishReason.ERROR or blamed or self.twice, "an error without a fault of its own"
        if last.reason is FinishReason.REJECTED:
            assert last.usage.queue_s is None, "rejected, but it ran"
        if "before the first step" in str(last.error):
            assert last.usage.queue_s is None, "it missed its queue deadline, but it ran"
        if last.usage.ttft_s is not None:
            assert last.usage.queue_s is not None
            assert 0 <= last.usage.queue_s <= last.usage.ttft_s <= last.usage.total_s
        expected = [undisturbed(self.prompt, self.params, self.tenant, index) for index in range(self.params.answers)]
        if whole:
            assert last.reason is expected[0].reason
            if self.params.best_of:
                expected = sorted(expected, key=lambda a: a.likelihood, reverse=True)[: self.params.n]
            assert answers == [answer.tokens for answer in expected]
        elif self.params.best_of:
            assert all(any(a == e.tokens[: len(a)] for e in expected) for a in answers)
        else:
            assert all(a == e.tokens[: len(a)] for a, e in zip(answers, expected, strict=True))
        if self.params.prompt_logprobs is not None:
            for index, answer in enumerate(answers):
                self._check_prompt_logprobs(index, wanted=bool(answer))
        TALLY[f"ended: {last.reason}"] += 1

    def _check_prompt_logprobs(self, index: int, *, wanted: bool) -> None:
        told = [e for e in self.events if isinstance(e, TokensEvent) and e.index == index and e.prompt_logprobs]
        assert len(told) == wanted
        if not told:
            return
        logprobs, ids = told[0].prompt_logprobs, self.prompt.token_ids.tolist()
        keys = keys_of(ids, self.prompt.images, self.tenant, [])
        assert logprobs is not None
        assert [p and p.token_id for p in logprobs] == [None, *ids[1:]]
        expected = [float(LOGITS[key % len(LOGITS)].log_softmax(-1)[t]) for key, t in zip(keys, ids[1:], strict=False)]
        assert [p.logprob for p in logprobs if p] == pytest.approx(expected, abs=1e-4)


# What can happen


def prompt_of(stream: int, length: int, picture: int, tail: int) -> Prompt:
    """The beginning of a stream, its pictures being the given one or another, and `tail` further tokens."""
    cut = next((start for start in PICTURES[stream] if start < length < start + IMAGE), length)
    images = tuple(
        PromptImage(start, IMAGE, NO_PIXELS, bytes([picture] * 16)) for start in PICTURES[stream] if start < cut
    )
    tokens = np.array([*STREAMS[stream][:cut], *range(2, 2 + tail)], np.int32)
    for image in images:
        tokens[image.start : image.end] = 0
    return Prompt(tokens, images)


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
        self.engine._scheduler._preempt(running[which % len(running)])
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
        assert not scheduler._leaders
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


TestInterleavings = Interleaving.TestCase
TestInterleavings.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# Interleavings that once broke a promise


USUAL = Setting(
    groups=(L, L, G),
    block_size=4,
    window=8,
    running=1,
    spare_tokens=10,
    spare_blocks=40,
    host_slots=0,
    cold=None,
    waiting=100,
    waiting_tokens=10_000,
    ageing_s=30.0,
    target_ms=None,
    prefix_cache=True,
    expected_answer=None,
    taught=False,
)
REALTIME, BATCH = PriorityClass.REALTIME, PriorityClass.BATCH


@contextmanager
def interleaving(**setting: Any) -> Iterator[Interleaving]:
    """An interleaving by hand; in the end all must have ended as they should."""
    machine = Interleaving()
    machine.set_up(setting=replace(USUAL, **setting))
    yield machine
    machine.the_books_are_right()
    machine.teardown()


def submit(
    machine: Interleaving, *, length: int = 13, priority: int = BATCH, queue_s: float | None = None, **params: Any
):
    """Submit a request; its events."""
    prompt, asked = (
        prompt_of(0, length, 0, 0),
        SamplingParams(**{"max_tokens": 16, "seed": 0, "ignore_eos": True} | params),
    )
    caller = Caller(prompt, asked, Deadlines(queue_s=queue_s), raises=False)
    machine._submit(caller, priority=priority)
    return caller


def test_two_answers_of_one_request_are_turned_away_at_once():
    with interleaving(waiting_tokens=100) as machine:
        submit(machine, length=8)
        machine.step(1)
        low = submit(machine, n=3)
        machine.step(1)
        high = submit(machine, length=37, priority=REALTIME)
        machine.step(1)
        assert low.last
        assert low.last.reason is FinishReason.REJECTED
    assert high.last
    assert high.last.reason is FinishReason.LENGTH


def test_a_prompt_computed_twice_has_its_logprobs_once():
    with interleaving(spare_tokens=0) as machine:
        submit(machine, length=37, prompt_logprobs=1)
        machine.step(2)
        machine.preempt(0)


def test_an_answer_that_begins_with_a_fork_has_waited_until_then():
    with interleaving(running=2) as machine:
        callers = [submit(machine, max_tokens=tokens) for tokens in (1, 1, 8)]
        machine.step(1)
    usages = [caller.last.usage for caller in callers if caller.last]
    assert [usage.queue_s for usage in usages[:2]] == [0.0, 0.0]


def test_a_request_that_runs_is_not_rejected_for_one_of_its_answers_that_waits():
    with interleaving(waiting=3) as machine:
        low = submit(machine, n=3, prompt_logprobs=0)
        machine.step(3)
        for _ in range(2):
            submit(machine, priority=REALTIME)
        machine.step(1)
        assert low.last
        assert low.last.reason is FinishReason.CANCELLED
        assert "the queue is full" in str(low.last.error)
        assert any(low.answers())


def test_a_queue_deadline_is_for_the_first_of_the_answers():
    with interleaving() as machine:
        caller = submit(machine, n=3, prompt_logprobs=0, queue_s=0.01)
        machine.step(1)
    assert caller.last
    assert caller.last.reason is FinishReason.LENGTH


def test_one_that_gives_way_to_a_promoted_one_does_not_come_back_in_the_same_step():
    with interleaving(running=4, spare_tokens=40, spare_blocks=8, ageing_s=0.0, prefix_cache=False) as machine:
        for _ in range(6):
            submit(machine, length=1, priority=REALTIME, max_tokens=1)
            machine.step(2)
        for priority, length in ((BATCH, 8), (REALTIME, 37), (REALTIME, 16)):
            submit(machine, length=length, priority=priority)
            machine.time_passes(0.002)
        machine.step(1)
