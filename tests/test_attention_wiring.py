"""Where attention falls reaches the policies, whoever computes it and however a sequence ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.computation import compute
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch, SequenceBlocks
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.processor.prompt import Prompt

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL
MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
SIZE = 4
TOLD = list[tuple[bytes, float]]


@contextmanager
def listening() -> Iterator[TOLD]:
    """What the host tier's policies are told meanwhile, and only of the global group."""
    told: TOLD = []

    def attend(_: HostTier, group: LayerGroup, name: bytes, mass: float) -> None:
        assert group is G
        told.append((name, mass))

    with mock.patch.object(HostTier, "attend", attend):
        yield told


# A step's masses.


class Runner:
    """Measures the first block of whoever has `measured` tokens computed; fails where `broken` are in it."""

    def __init__(self, measured: set[Sequence], broken: set[Sequence]) -> None:
        self._measured, self._broken = measured, broken

    def run(self, plan: StepPlan, _ahead: torch.Tensor | None = None) -> StepOutput:
        sequences = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        if self._broken & {*sequences}:
            raise RuntimeError("no")
        masses = {
            row: np.array([float(sequence.request.id)], np.float32)
            for row, sequence in enumerate(sequences)
            if sequence in self._measured
        }
        executor: Any = mock.Mock(last=lambda _hidden, _attention, rows: torch.zeros(len(rows), 3))
        nothing = torch.empty(0)
        return StepOutput(executor, nothing, nothing, tuple(range(len(sequences) + 1)), lambda: masses)


def sequence(number: int, tokens: int = 5) -> Sequence:
    prompt = Prompt(np.arange(number, number + tokens, dtype=np.int32))
    return Sequence(Request(str(number), prompt, SamplingParams(), lambda _: None, 0.0), max_tokens=100)


@pytest.mark.parametrize("broken", [None, 0, 3])
def test_a_steps_masses_are_told_by_sequence_also_of_one_that_falls_apart(broken: int | None) -> None:
    sequences = [sequence(number) for number in range(5)]
    plan = StepPlan(sequences[:2], [Chunk(s, 0, 5) for s in sequences[2:]], StepShape(0, 0, 0, 0))
    measured = {sequences[0], sequences[3], sequences[4]}
    failing = set() if broken is None else {sequences[broken]}
    computed = compute(Runner(measured, failing), plan)  # type: ignore[arg-type]
    assert {s: mass.tolist() for s, mass in computed.mass().items()} == {
        s: [float(s.request.id)] for s in measured - failing
    }
    assert computed.failed.keys() == failing


# What the books make of them.


def books(*, host: bool = True) -> BlockManager:
    layout = KVLayout.of((L, G), block_size=SIZE, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
    lower = LowerTiers(HostTier({L: 20, G: 20}, LRU)) if host else None
    return BlockManager(layout, {L: 40, G: 40}, max_chunk=64, lower=lower)


def computed(manager: BlockManager, tokens: int, *, named: bool = True) -> tuple[SequenceBlocks, BlockNames]:
    chain = BlockNames(NameScheme(SIZE), list(range(tokens)), (), "")
    names = chain if named else None
    blocks = manager.open(names, PrefixMatch(), max_tokens=64, expected_tokens=tokens)
    assert manager.extend(blocks, 0, tokens)
    manager.note(blocks, tokens)
    return blocks, chain


def test_a_closed_sequence_tells_what_each_full_block_got_of_the_mean_blocks_attention() -> None:
    manager = books()
    blocks, chain = computed(manager, 14)
    blocks.attended(np.array([0.5, 0.1, 0.2, 0.2], np.float32))
    with listening() as told:
        manager.close(blocks)
    assert [name for name, _ in told] == [*chain.first(3)[:3]], "the partial block has no name"
    assert [mass for _, mass in told] == pytest.approx([1.875, 0.375, 0.75])


def test_a_fork_goes_on_from_the_attention_of_the_first_one_and_each_has_its_own() -> None:
    manager = books()
    first, chain = computed(manager, 8)
    first.attended(np.array([0.75, 0.25], np.float32))
    second = manager.fork(first, chain, computed=8, max_tokens=64, expected_tokens=8)
    assert second is not None
    for _ in range(200):
        first.attended(np.array([0.0, 1.0], np.float32))
    with listening() as told:
        manager.close(second)
        assert [mass for _, mass in told] == pytest.approx([1.5, 0.5])
        told.clear()
        manager.close(first)
        assert [mass for _, mass in told] == pytest.approx([0, 2], abs=1e-3)


def test_nothing_is_told_of_what_was_never_measured_or_has_no_names() -> None:
    manager = books()
    with listening() as told:
        manager.close(computed(manager, 14)[0])
        unnamed, _ = computed(manager, 14, named=False)
        unnamed.attended(np.array([0.5, 0.1, 0.2, 0.2], np.float32))
        manager.close(unnamed)
    assert told == []


def test_without_a_host_tier_nobody_keeps_attention() -> None:
    manager = books(host=False)
    blocks, _ = computed(manager, 14)
    assert blocks.mass is None
    blocks.attended(np.array([0.5, 0.5], np.float32))
    manager.close(blocks)


# The real model.


def config(**settings: Any) -> EngineConfig:
    small = {"model": MODEL, "device": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 2048}
    return EngineConfig.model_validate(small | settings)


FACTS = [
    f"The code of {name} is {code}. " for name, code in zip("ABCDEFGHIJKLMNOP", range(1000, 2600, 100), strict=True)
]


def test_a_request_tells_the_policies_where_its_answer_looked() -> None:
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with listening() as told, Engine(config(host_cache_bytes=2**24)) as engine:
        prompt = engine.processor.process("".join(FACTS) * 3 + "What is the code of G?")
        engine.generate(prompt.token_ids.tolist(), greedy)
        chain = BlockNames(NameScheme(32), prompt.token_ids.tolist(), (), "").first(len(prompt) // 32)
        assert [name for name, _ in told[: len(chain)]] == [*chain]
        masses = np.array([mass for _, mass in told])
        assert len(masses) == (len(prompt) + 39) // 32, "the answer's own blocks are among them"
        assert masses.mean() == pytest.approx(1), "told against the mean of blocks with names"
        assert masses.max() > 3, "attention is no even thing"


def test_without_a_host_tier_nothing_is_measured_and_tokens_are_the_same_with_one() -> None:
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    question = "".join(FACTS) + "What is the code of G?"
    with Engine(config(host_cache_bytes=0)) as engine:
        assert engine._model.runner.sampling is None
        plain = engine.generate(question, greedy)
    with Engine(config(host_cache_bytes=2**24)) as engine:
        assert engine._model.runner.sampling is not None
        assert engine.generate(question, greedy).token_ids == plain.token_ids
