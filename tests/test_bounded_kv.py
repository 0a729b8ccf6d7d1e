"""Bounded KV: what stays, what comes back, and that nobody else is told what was computed under a bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from scripts.eval_demo import Case, needle_cases
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.plan import SchedulerLimits, StepPlan
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.attention_mass import AttentionMass
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch, SequenceBlocks
from wicore_backend.hmt.bounded_kv import KVBudget
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.transfers import Route
from wicore_backend.processor.prompt import Prompt

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL
MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
SIZE = 4
SMALL = KVBudget(blocks=6, first=1, recent=2)


def measured(*mass: float) -> AttentionMass:
    average = AttentionMass()
    average.fold(np.array(mass, np.float32))
    return average


def chosen(budget: KVBudget, mass: AttentionMass, held: list[int], *, lost: tuple[int, ...] = ()) -> list[int]:
    gone = np.isin(np.arange(len(held)), lost)
    return [int(index) for index in np.flatnonzero(budget.choose(mass, np.array(held, np.bool_), gone))]


# What stays.


def test_the_ends_stay_and_between_them_what_attention_fell_on() -> None:
    mass = measured(0, 0, 0.1, 0, 0, 0.5, 0, 0, 0, 0.3, 0)
    assert chosen(KVBudget(6, 1, 2), mass, [1] * 12) == [0, 5, 6, 9, 10, 11]
    assert chosen(KVBudget(4, 1, 2), mass, [1] * 12) == [0, 5, 10, 11]
    assert chosen(KVBudget(6, 1, 2), AttentionMass(), [1] * 12) == [0, 7, 8, 9, 10, 11], "without any, the recent ones"


def test_a_block_that_left_comes_back_when_its_score_is_clearly_higher() -> None:
    held = [1, 0, 1, 1, 0, 1, 1]
    assert chosen(KVBudget(5, 1, 2), measured(0, 0, 0.2, 0.2, 0.25, 0, 0), held) == [0, 2, 3, 5, 6]
    assert chosen(KVBudget(5, 1, 2), measured(0, 0, 0.2, 0.2, 0.45, 0, 0), held) == [0, 3, 4, 5, 6]
    assert chosen(KVBudget(5, 1, 2), measured(0, 0, 0.2, 0.2, 0.45, 0, 0), held, lost=(4,)) == [0, 2, 3, 5, 6]


@given(st.integers(4, 30), st.integers(0, 40), st.randoms(use_true_random=False))
def test_a_choice_is_as_large_as_the_budget_and_of_blocks_that_can_be_had(
    blocks: int, count: int, random: Random
) -> None:
    budget = KVBudget(blocks, 1, 2)
    count = max(count, blocks)
    lost = np.array([random.random() < 0.3 for _ in range(count)])
    lost[[0, -2, -1]] = False
    held = ~lost & np.array([random.random() < 0.7 for _ in range(count)])
    held[[0, -2, -1]] = True
    keep = budget.choose(measured(*(random.random() for _ in range(count - 1))), held, lost)
    assert keep[[0, -2, -1]].all()
    assert not (keep & lost).any()
    assert keep.sum() == min(blocks, (~lost).sum())


@pytest.mark.parametrize(("tokens", "size", "blocks"), [(416, 32, 13), (447, 32, 13), (13, 1, 13)])
def test_a_budget_is_of_whole_blocks(tokens: int, size: int, blocks: int) -> None:
    assert KVBudget.of(tokens, size).blocks == blocks
    with pytest.raises(
        InvalidArgumentError, match=f"kv_budget_tokens = {13 * size - 1}: .* give it {13 * size} or more"
    ):
        KVBudget.of(13 * size - 1, size)


# The books.


def books(*, blocks: int = 60, host: int = 0, budget: KVBudget | None = SMALL) -> BlockManager:
    layout = KVLayout.of((L, G), block_size=SIZE, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
    lower = LowerTiers(HostTier({L: host, G: host}, LRU)) if host else None
    return BlockManager(layout, {L: 60, G: blocks + 1}, max_chunk=64, lower=lower, budget=budget)


def computed(manager: BlockManager, tokens: int, *mass: float) -> SequenceBlocks:
    chain = BlockNames(NameScheme(SIZE), list(range(200)), (), "")
    blocks = manager.open(chain, PrefixMatch(), max_tokens=200, expected_tokens=tokens, tokens=tokens)
    assert manager.extend(blocks, 0, tokens)
    manager.note(blocks, tokens)
    blocks.attended(np.array(mass, np.float32))
    return blocks


def bound(manager: BlockManager, blocks: SequenceBlocks, position: int) -> list[int]:
    """Decode a position; the blocks that are there then."""
    manager.bound(blocks, position)
    manager.check_integrity()
    assert manager.extend(blocks, position, position + 1)
    manager.check_integrity()
    return [int(index) for index in np.flatnonzero(blocks.tables[G])]


def test_the_device_has_no_more_of_a_sequence_than_its_budget() -> None:
    manager = books()
    blocks = computed(manager, 40, 0, 0, 0, 0.9, 0, 0, 0, 0, 0, 0)
    assert manager.pools[G].active == 10, "a prompt is computed with all its blocks"
    assert bound(manager, blocks, 40) == [0, 2, 3, 4, 9, 10]
    assert manager.pools[G].active == blocks.held(G) == 6
    assert manager.pools[G].cached == 5
    manager.close(blocks)
    assert manager.pools[G].active == 0


def test_a_block_comes_back_from_the_device_or_from_host_memory_or_not_at_all() -> None:
    for host, evicted, back in [(0, False, True), (20, True, True), (0, True, False)]:
        manager = books(host=host)
        pool, blocks = manager.pools[G], computed(manager, 40, 0, 0, 0, 0.9, 0, 0, 0.1, 0, 0, 0)
        assert bound(manager, blocks, 40) == [0, 2, 3, 4, 9, 10]
        if evicted:
            pool.release(pool.take(pool.available))
        manager.take_transfers()
        for _ in range(60):
            blocks.attended(np.array([0.01] * 11, np.float32))
        assert (bound(manager, blocks, 44) == [0, 5, 6, 7, 10, 11]) is back
        assert manager.bound_counts.returned == (3 if back else 0)
        assert manager.bound_counts.lost == (0 if back else 3)
        loads = [t.target for t in manager.take_transfers() if t.route is Route.HOST_TO_DEVICE]
        assert loads == (blocks.tables[G][5:8].tolist() if host else [])


def test_those_that_have_left_keep_their_average() -> None:
    manager = books()
    blocks = computed(manager, 40, 0, 0, 0, 0.8, 0, 0, 0.2, 0, 0, 0)
    bound(manager, blocks, 40)
    for _ in range(60):
        blocks.attended(np.array([0.1, 0, 0.1, 0, 0, 0, 0, 0, 0, 0.1, 0.7], np.float32))
    assert blocks.mass is not None
    assert blocks.mass.average()[[3, 6]] == pytest.approx([0, 0.2], abs=1e-2)


def test_what_is_computed_under_a_bound_gets_no_name() -> None:
    manager = books()
    blocks = computed(manager, 42, *[0.1] * 10)
    assert blocks.names is not None
    for position in range(42, 80):
        if position % SIZE == 0 or position == 42:
            bound(manager, blocks, position)
    manager.note(blocks, 80)
    manager.close(blocks)
    manager.check_integrity()
    match = manager.match(blocks.names, 20)
    assert match.known == 10
    assert manager.pools[L].find(blocks.names.first(20)[18]) is None


def test_until_the_budget_is_reached_blocks_are_exact_and_named() -> None:
    manager = books()
    blocks = computed(manager, 8, 0.5, 0.5)
    for position in range(8, 30):
        held = bound(manager, blocks, position)
        assert (len(held) == position // SIZE + 1) is (position < 24)
        assert len(held) <= 6
    assert blocks.full == 6
    manager.close(blocks)


def test_room_is_counted_for_the_whole_prompt_and_then_for_the_budget() -> None:
    manager = books()
    room = manager.room_for(None, PrefixMatch(), tokens=4, expected_tokens=100)[G]
    assert room == 60 - 6
    blocks = manager.open(None, PrefixMatch(), max_tokens=200, expected_tokens=100, tokens=40)
    assert manager.room_for(None, PrefixMatch(), tokens=40, expected_tokens=100)[G] == 60 - 10 - 10
    manager.extend(blocks, 0, 40)
    assert manager.room_for(None, PrefixMatch(), tokens=4, expected_tokens=100)[G] == room - 10
    bound(manager, blocks, 40)
    assert manager.room_for(None, PrefixMatch(), tokens=4, expected_tokens=100)[G] == room - 6


def test_a_fork_has_the_same_holes_and_releases_its_own() -> None:
    manager = books()
    first = computed(manager, 42, *[0.1] * 11)
    bound(manager, first, 42)
    held = bound(manager, first, 44)
    second = manager.fork(first, first.names, computed=46, max_tokens=80, expected_tokens=60)
    assert second is not None
    manager.check_integrity()
    assert np.flatnonzero(second.tables[G]).tolist() == held
    assert second.full == first.full == 10
    manager.close(first)
    for position in (48, 52, 56):
        assert len(bound(manager, second, position)) == 6
    manager.close(second)
    manager.check_integrity()


def test_what_comes_back_leaves_room_for_the_block_that_is_written_next() -> None:
    manager = books(host=20)
    blocks = computed(manager, 40, 0, 0, 0, 0.9, 0, 0, 0.1, 0, 0, 0)
    bound(manager, blocks, 40)
    other = manager.fork(blocks, None, computed=44, max_tokens=44, expected_tokens=44)
    assert other is not None  # Whose blocks do not become available when the first one lets go of them.
    pool = manager.pools[G]
    pool.take(pool.available - 2)
    for _ in range(60):
        blocks.attended(np.array([0.01] * 11, np.float32))
    manager.bound(blocks, 44)
    assert manager.bound_counts.returned == 1
    assert manager.extend(blocks, 44, 45)


def test_a_prompt_is_admitted_when_all_its_blocks_are_there_beside_what_others_keep() -> None:
    manager = books(blocks=22)
    scheduler = Scheduler(manager, SchedulerLimits(max_batch_tokens=16, max_running=4), StepTimeModel())
    for first in (0, 100):
        prompt = Prompt(np.arange(first, first + 60, dtype=np.int32))
        request = Request("r", prompt, SamplingParams(), lambda _: None, float(first))
        scheduler.add(Sequence(request, max_tokens=100), 0.0)
    most = 0
    for now in range(100):
        plan = scheduler.plan(float(now))
        assert scheduler.num_running < 2 or plan.decodes, "the first one may still need more than its budget"
        scheduler.complete(plan)
        for sequence in [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]:
            sequence.tokens.append(1)
            if len(sequence.tokens) == sequence.max_tokens:
                scheduler.finished(sequence)
        scheduler.check_integrity()
        most = max(most, scheduler.num_running)
    assert not scheduler.has_work
    assert most == 2, "what the first one keeps leaves room for the second one's prompt"
    assert scheduler.counts.preemptions == 0


# Everything at once, over a fake memory in which each key says what it was computed from.


class World:
    """A scheduler over little memory; requests that share prefixes come, fork, give way, are cancelled and end."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.books = books(blocks=self.random.choice([40, 50]), host=self.random.choice([0, 8, 30]))
        limits = SchedulerLimits(max_batch_tokens=24, max_running=5)
        self.scheduler = Scheduler(self.books, limits, StepTimeModel())
        pools = self.books.pools
        self.device: dict[LayerGroup, list[list[Any]]] = {g: [[None] * SIZE for _ in range(61)] for g in pools}
        self.host: dict[LayerGroup, list[list[Any]]] = {g: [[None] * SIZE for _ in range(30)] for g in pools}
        self.keys: dict[Sequence, list[Any]] = {}
        self.exact: dict[Sequence, list[int]] = {}
        self.named: dict[bytes, list[int]] = {}
        self.tally: Counter[str] = Counter()
        self.ends: dict[Sequence, int] = {}

    def come(self) -> None:
        stream = Random(self.random.choice([1, 2]))
        shared = [stream.randrange(50) for _ in range(80)][: self.random.choice([0, 16, 48, 80])]
        own = [self.random.randrange(50) for _ in range(self.random.randint(1, 40))]
        prompt = Prompt(np.array(shared + own, np.int32))
        request = Request(
            "r", prompt, SamplingParams(), lambda _: None, self.random.random(), self.random.choice([0, 0, 5])
        )
        for index in range(self.random.choice([1, 1, 3])):
            sequence = Sequence(request, max_tokens=len(prompt) + 60, index=index)
            names = BlockNames(NameScheme(SIZE), sequence.tokens, (), "")
            sequence.twin_key = names.whole(len(prompt))
            sequence.names = names if self.random.random() < 0.9 else None
            self.ends[sequence] = len(prompt) + self.random.randint(1, 60)
            self.scheduler.add(sequence, 0.0)

    def step(self, now: float) -> None:
        bounded = {s for s in self.scheduler.running if s.running_blocks.holes}
        plan = self.scheduler.plan(now)
        self.tally["preempted under a bound"] += sum(s.blocks is None for s in bounded)
        self.scheduler.check_integrity()
        for transfer in self.books.take_transfers():
            source = self.host if transfer.route is Route.HOST_TO_DEVICE else self.device
            target = self.host if transfer.route is Route.DEVICE_TO_HOST else self.device
            target[transfer.group][transfer.target] = list(source[transfer.group][transfer.source])
            self.tally[transfer.route.name] += 1
        for sequence in plan.decodes:
            assert sequence.running_blocks.held(G) <= SMALL.blocks
            self.tally["decodes with holes"] += sequence.running_blocks.holes > 0
            self._compute(sequence, sequence.computed, sequence.computed + 1)
        for chunk in plan.chunks:
            assert not chunk.sequence.running_blocks.holes, "prompts are computed exactly"
            self._compute(chunk.sequence, chunk.start, chunk.end)
        ready = [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]
        for sequence in ready:
            held = sequence.running_blocks.tables[G][: sequence.computed // SIZE + 1] != 0
            sequence.running_blocks.attended((held * self.rates(len(held))).astype(np.float32))
        for leader, fork in self.scheduler.complete(plan):
            self.keys[fork] = list(self.keys[leader])
            self.tally["forks"] += 1
            ready.append(fork)
        for sequence in ready:
            sequence.tokens.append(self.random.randrange(50))
            if len(sequence.tokens) >= self.ends[sequence]:
                self.scheduler.finished(sequence)
        self._check_names()

    def rates(self, count: int) -> Any:
        return np.random.default_rng(self.random.randrange(10**6)).exponential(size=count)

    def _compute(self, sequence: Sequence, start: int, end: int) -> None:
        keys, exact = self.keys.get(sequence, []), self._exact(sequence)
        if len(keys) != start:  # New, or back after it gave way.
            keys = exact[:start]
        blocks = sequence.running_blocks
        for position in range(start, end):
            seen_all = not blocks.holes and (not keys or keys[-1] == exact[len(keys) - 1])
            keys.append(exact[position] if seen_all else (sequence.index, position, self.random.random()))
            for group in self.device:
                self.device[group][blocks.tables[group][position // SIZE]][position % SIZE] = keys[position]
        self.keys[sequence] = keys
        for group, memory in self.device.items():
            for position in range(0 if group is G else max(0, start - 7), end):
                if (block := blocks.tables[group][position // SIZE]) or group is L:
                    assert memory[block][position % SIZE] == keys[position]

    def _exact(self, sequence: Sequence) -> list[int]:
        """The keys of a sequence's tokens as they are if each sees all before it; and what its blocks' names tell."""
        keys = self.exact.setdefault(sequence, [])
        while len(keys) < len(sequence.tokens):
            keys.append(hash((keys[-1] if keys else 0, sequence.tokens[len(keys)])))
            if sequence.names is not None and len(keys) % SIZE == 0:
                self.named[sequence.names.first(len(keys) // SIZE)[len(keys) // SIZE - 1]] = keys[-SIZE:]
        return keys

    def _check_names(self) -> None:
        """What can be found under a name is what was computed exactly of that name's tokens."""
        for group, pool in self.books.pools.items():
            for name, block in pool._named.items():
                assert self.device[group][block] == self.named[name], "a name tells what is not there"


def test_no_interleaving_loses_a_block_or_names_what_is_inexact() -> None:
    tally: Counter[str] = Counter()
    for seed in range(12):
        world = World(seed)
        for now in range(3000):
            if now < 250 and world.random.random() < 0.12:
                world.come()
            if now < 250 and world.random.random() < 0.03 and world.scheduler.running:
                world.scheduler.remove(world.random.choice(world.scheduler.running))
            if world.scheduler.has_work:
                world.step(float(now))
        assert not world.scheduler.has_work, seed
        assert world.books.pools[G].active == world.books.pools[L].active == 0, seed
        tally += world.tally
        tally["returned"] += world.books.bound_counts.returned
    wanted = ["decodes with holes", "preempted under a bound", "forks", "HOST_TO_DEVICE", "returned"]
    assert all(tally[what] > 20 for what in wanted), tally


# The real engine.


def config(**settings: Any) -> EngineConfig:
    small = {"model": MODEL, "device": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 4096}
    return EngineConfig.model_validate(small | settings)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def needle() -> Case:
    """A question about 2K tokens whose answer, which has several, is far from both ends."""
    return next(needle_cases([2048], [0.25], 1, seed=2))


def by_recency(_: AttentionMass, count: int) -> NDArray[np.float32]:
    return np.arange(count, dtype=np.float32)


def test_a_fifth_of_the_blocks_is_enough_for_an_answer_if_attention_chooses_them(needle: Case) -> None:
    messages: Any = needle.messages
    with Engine(config(kv_budget_tokens=416)) as engine:
        blocks, runner, held = engine._model.blocks, engine._model.runner, Counter[int]()
        assert blocks.budget is not None

        def run(plan: StepPlan, ahead: Tensor | None = None) -> StepOutput:
            for sequence in plan.decodes:
                held[int(np.count_nonzero(sequence.running_blocks.tables[G]))] += 1
            return type(runner).run(runner, plan, ahead)

        with mock.patch.object(runner, "run", run):
            assert engine.generate(messages, SamplingParams(max_tokens=16, temperature=0.0)).text == needle.answer
        assert held.keys() == {13}
        blocks.budget = replace(blocks.budget, scores=by_recency)
        assert engine.generate(messages, SamplingParams(max_tokens=16, temperature=0.0)).text != needle.answer


def test_within_the_budget_answers_are_exact_and_beyond_it_later_requests_are(needle: Case) -> None:
    messages: Any = needle.messages
    with Engine(config()) as engine:
        prompt = engine.processor.process(messages).token_ids.tolist()
        answers = [engine.generate(tokens, greedy(40)).token_ids for tokens in (prompt[:300], prompt)]
    with Engine(config(kv_budget_tokens=416)) as engine:
        assert engine.generate(prompt[:300], greedy(40)).token_ids == answers[0]
        assert engine._model.blocks.bound_counts.left == 0
        lossy = engine.generate(prompt, greedy(40)).token_ids
        assert engine._model.blocks.bound_counts.left > 0
        engine._model.blocks.budget = None
        again = engine.generate([*prompt, *lossy], greedy(16))
        assert again.usage.cached_tokens == len(prompt) // 32 * 32, "what was computed under a bound is not reused"
        assert engine.generate(prompt, greedy(40)).token_ids == answers[1]
    with Engine(config(prefix_cache=False)) as engine:
        assert engine.generate([*prompt, *lossy], greedy(16)).token_ids == again.token_ids


def test_who_gave_way_goes_on_as_if_its_answer_so_far_had_been_asked(needle: Case) -> None:
    messages: Any = needle.messages
    with Engine(config(kv_budget_tokens=416, prefix_cache=False)) as engine:
        prompt = engine.processor.process(messages).token_ids.tolist()
        scheduler = engine._scheduler
        plan_step = scheduler.plan

        def plan(*how: Any) -> StepPlan:
            for sequence in scheduler.running:
                if sequence.answered == 20 and not sequence.preemptions:
                    assert sequence.running_blocks.holes
                    scheduler.preempt(sequence)
            return plan_step(*how)

        with mock.patch.object(scheduler, "plan", plan):
            whole = engine.generate(prompt, greedy(40)).token_ids
        assert engine.statistics().scheduler.preemptions == 1
        assert engine.generate([*prompt, *whole[:20]], greedy(20)).token_ids == whole[20:]


def test_a_budget_that_leaves_no_choice_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="kv_budget_tokens = 415"):
        Engine(config(kv_budget_tokens=415))
