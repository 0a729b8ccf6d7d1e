"""The real engine over the fake model (`tests/hash_model.py`), its loop turned by hand and its clock moved by steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.fake_cold_tier import FakeColdTier
from tests.hash_model import CONTEXT, EOS, IMAGE, TALLY, VOCAB, Clock, Memory, Runner, keys_of, next_token
from wicore_backend import Engine, EngineConfig
from wicore_backend.engine.computation import StepFailedError
from wicore_backend.engine.health import HealthMonitor
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.request import Sequence
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

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL


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
            engine._scheduler._expectations.answered(setting.expected_answer)
    if setting.taught:
        for n in range(40):
            shape = StepShape(n % 4 + 1, n % 4 + 1, n % 4 * 20, 0)
            shape = shape.with_prefill(n % 5 * 5, 0) if n % 5 else shape
            step_time.observe(shape, 0.001 + 0.0001 * shape.tokens)
    return engine, runner
