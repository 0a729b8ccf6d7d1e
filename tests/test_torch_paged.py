"""Paged attention against dense attention worked out token by token, on random steps over a pool full of rubbish."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged_steps import DECODES, PREFILLS, Part, Shape, check, parts_of_a_step, parts_with_holes
from wicore_backend.attention import torch_pieces
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.closing_up import close_up
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (2, 2), (4, 1)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize("parts", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "both"])
def test_a_step_equals_dense_attention(parts: list[Part], heads: tuple[int, int], softcap: float | None) -> None:
    check(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_half_precision_is_near_dense_attention(dtype: torch.dtype, softcap: float | None) -> None:
    check(Shape(dtype=dtype, softcap=softcap), DECODES + PREFILLS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_attention_over_fp8_is_dense_attention_over_what_was_rounded(dtype: torch.dtype, softcap: float | None) -> None:
    check(Shape(dtype=dtype, kv_dtype=FP8, softcap=softcap), DECODES + PREFILLS, measured={1: [0, 4, 6]})


@pytest.mark.parametrize("parts", [[Part(0, 1)], [Part(50, 1)], [Part(0, 1100)], [Part(100, 520, image=(505, 12))]])
def test_one_sequence_alone_in_tiles_where_it_is_long(parts: list[Part]) -> None:
    check(Shape(kv_heads=1, group_size=1, block_size=16), parts)


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = [5, 2000, 9, 1, 40, 1900, 70]
    check(Shape(kv_heads=1, group_size=2, window=600), [Part(length, 1) for length in lengths])


def test_decodes_beyond_the_scratch_budget_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pieces, "_DECODE_SCRATCH_BYTES", 4096)
    check(Shape(), [Part(40 + i, 1) for i in range(9)])


@settings(max_examples=60, deadline=None)
@given(
    parts=parts_of_a_step,
    block_size=st.sampled_from([1, 3, 8, 16]),
    window=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_random_steps_equal_dense_attention(parts: list[Part], block_size: int, window: int, seed: int) -> None:
    check(Shape(block_size=block_size, window=window), parts, seed=seed)


# Bounded KV: blocks of the global group that have left.

DECODES_WITH_HOLES = [
    Part(30, 1, gone=frozenset({0})),
    Part(31, 1, gone=frozenset({2, 3, 5})),
    Part(33, 1),
    Part(100, 1, gone=frozenset(range(1, 24))),
    Part(64, 1, gone=frozenset(range(16))),
]
PREFILLS_WITH_HOLES = [
    Part(17, 13, gone=frozenset({0, 1, 2})),
    Part(32, 40, gone=frozenset(range(8))),
    Part(25, 12, image=(2, 6), gone=frozenset({1, 4})),
    Part(0, 9),
]


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 8), (2, 2)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize(
    "parts",
    [DECODES_WITH_HOLES, PREFILLS_WITH_HOLES, DECODES_WITH_HOLES + PREFILLS_WITH_HOLES],
    ids=["decodes", "prefills", "both"],
)
def test_blocks_that_have_left_are_invisible(parts: list[Part], heads: tuple[int, int], softcap: float | None) -> None:
    check(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts)


@pytest.mark.parametrize(
    "part", [Part(400, 1, gone=frozenset(range(3, 20))), Part(400, 530, gone=frozenset(range(1, 25)))]
)
def test_one_sequence_alone_with_holes(part: Part) -> None:
    check(Shape(kv_heads=1, group_size=1, block_size=16), [part])


@settings(max_examples=60, deadline=None)
@given(
    parts=parts_with_holes,
    block_size=st.sampled_from([1, 3, 8, 16]),
    window=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_random_steps_with_holes_equal_dense_attention(
    parts: list[Part], block_size: int, window: int, seed: int
) -> None:
    check(Shape(block_size=block_size, window=window), parts, seed=seed)


def decodes_at(*positions: int, table: list[list[int]]) -> PackedStep:
    return PackedStep(
        positions=np.array(positions, np.int32),
        attend_limits=np.array(positions, np.int32),
        query_lens=np.ones(len(positions), np.int32),
        decodes=len(positions),
        block_tables={LayerGroup.GLOBAL: np.array(table, np.int32)},
    )


def test_a_step_without_holes_is_left_as_it_is() -> None:
    assert close_up(decodes_at(11, table=[[5, 6, 7]]), 4) is None
    assert close_up(decodes_at(11, 3, table=[[5, 6, 7], [8, 0, 0]]), 4) is None


def test_only_blocks_that_are_there_are_read() -> None:
    closed_up = close_up(decodes_at(18, 9, table=[[5, 0, 0, 6, 7, 0], [8, 0, 9, 99, 0, 0]]), 4)
    assert closed_up is not None
    assert closed_up.step.block_tables[LayerGroup.GLOBAL].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert closed_up.step.positions.tolist() == closed_up.step.attend_limits.tolist() == [10, 5]
    assert closed_up.held.tolist() == [
        [True, False, False, True, True, False],
        [True, False, True, False, False, False],
    ]


def test_a_block_that_the_step_writes_cannot_have_left() -> None:
    with pytest.raises(ValueError, match="block 2 of sequence 1 is written in this step"):
        close_up(decodes_at(3, 9, table=[[8, 0, 0], [5, 6, 0]]), 4)
