"""The load that the attention signal is judged by, and that its arms may be run without the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.eval_attention_cache import ARMS, WITHOUT, LoadShape, Outcome, make_load, record, run_arm, table

TINY = LoadShape(sessions=5, documents=2, once=0.4, shortest=256, longest=384)


def test_loads_differ_in_questions_to_documents_that_never_come_back() -> None:
    shape = replace(TINY, sessions=30)
    present, absent = (make_load(shape, name, seed=1) for name in ("present", "absent"))
    assert [replace(ask, messages=[]) for ask in present] == [replace(ask, messages=[]) for ask in absent]
    assert all((a.messages == b.messages) == a.returns for a, b in zip(present, absent, strict=True))
    once = [ask.document for ask in present if not ask.returns]
    assert once
    assert len(set(once)) == len(once)


def test_recalled_steps_hit_what_computed_ones_hit() -> None:
    asks = make_load(TINY, "absent", seed=1)
    recorded = record("absent", asks)
    slots = recorded.working_set // 4
    hits = [run_arm(ARMS[WITHOUT], asks, recorded, slots=slots, computed=computed) for computed in (True, False)]
    assert hits[0] == hits[1]
    assert 0 < hits[0] < recorded.prompt_tokens


def test_table_sums_seeds_and_tells_the_signals_part() -> None:
    found = dict(zip(ARMS, ([110, 90], [100, 100], [120, 120], [80, 80]), strict=True))
    outcomes = [Outcome("absent", s, 0.25, arm, 10, 500, found[arm][s]) for s in (0, 1) for arm in ARMS]
    *_, first, second, both = table(outcomes).splitlines()
    assert first == "| absent | 25% | 0 | 110 | 100 | 120 | 80 | +10.00% |"
    assert second.endswith("-10.00% |")
    assert both == "| absent | 25% | all | 200 | 200 | 240 | 160 | +0.00% |"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_makes_the_same_load(seed: int) -> None:
    assert make_load(TINY, "present", seed=seed) == make_load(TINY, "present", seed=seed)
    assert make_load(TINY, "present", seed=seed) != make_load(TINY, "present", seed=seed + 1)
