"""Paged attention against dense attention worked out token by token, on random steps over a pool full of rubbish."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged_steps import DECODES, PREFILLS, Part, Shape, check, parts_of_a_step
from wicore_backend.attention import torch_paged


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (2, 2), (4, 1)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize("parts", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "both"])
def test_a_step_equals_dense_attention(parts: list[Part], heads: tuple[int, int], softcap: float | None) -> None:
    check(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_half_precision_is_near_dense_attention(dtype: torch.dtype, softcap: float | None) -> None:
    check(Shape(dtype=dtype, softcap=softcap), DECODES + PREFILLS)


@pytest.mark.parametrize("parts", [[Part(0, 1)], [Part(50, 1)], [Part(0, 1100)], [Part(100, 520, image=(505, 12))]])
def test_one_sequence_alone_in_tiles_where_it_is_long(parts: list[Part]) -> None:
    check(Shape(kv_heads=1, group_size=1, block_size=16), parts)


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = [5, 2000, 9, 1, 40, 1900, 70]
    check(Shape(kv_heads=1, group_size=2, window=600), [Part(length, 1) for length in lengths])


def test_decodes_beyond_the_scratch_budget_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paged, "_DECODE_SCRATCH_BYTES", 4096)
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
