"""Decodes by the kernel for Hopper, compiled by g++: what it computes, and that no order of its parts changes that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hopper_twin
from tests.hopper_twin.small_decodes import FORM, FORM_FP8, TEXTS, SmallDecodes
from wicore_backend.attention.gpu.hopper_decode import DEEP, SEVERAL, SOURCE, TUNED, Form, Tuning
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup

pytestmark = pytest.mark.skipif(hopper_twin.gxx() is None, reason="needs g++")

LOCAL = LayerGroup.LOCAL
BOUND = 1e-2


def form(head_dim: int, kv_heads: int, group: int, block_size: int, tuning: Tuning) -> Form:
    return Form(head_dim, kv_heads, group, block_size, tuning=tuning, most_sequences=8)


def cut(warps: int, stages: int, least: int = 1) -> Tuning:
    return Tuning(warps=warps, blocks=1, stages=stages, least=least)


MANY = form(128, 2, 2, 32, SEVERAL)
LARGE = form(256, 1, 4, 32, SEVERAL)
FAR, LARGE_FAR = (replace(one, tuning=DEEP) for one in (MANY, LARGE))
ALONE = form(256, 1, 8, 64, cut(1, 2))
AS_TUNED_FP8 = {SEVERAL: TUNED[FP8].several, DEEP: TUNED[FP8].few}
CASES: dict[str, dict[str, Any]] = {
    "around edges of tiles": {"keys": [1, 2, 32, 33, 34, 64, 65]},
    "hundreds of keys": {"keys": [300, 5, 129], "blocks": 8},
    "one that many blocks have a part of": {"keys": [200], "blocks": 9},
    "several of one tile for each block": {"keys": [1, 30, 7, 1, 32, 2, 9, 4], "blocks": 4},
    "a block for each head": {"keys": [40, 90, 3], "blocks": 2},
    "more blocks than tiles": {"keys": [3, 40], "blocks": 18},
    "idle rows": {"keys": [70, 1, 36], "room": 8},
    "one and idle rows": {"keys": [33], "room": 2},
    "a window": {"keys": [100, 64, 65, 180, 32], "group": LOCAL, "room": 7},
    "windows that begin and end with tiles": {"keys": [95, 96, 97, 31, 32], "group": LOCAL, "window": 32},
    "a window of one key": {"keys": [1, 33, 64], "group": LOCAL, "window": 1},
    "three layers": {"keys": [33, 100, 1], "layers": 3},
    "measured": {"keys": [200, 1, 33, 32, 31, 65], "measured": [0, 1, 2, 3, 5], "room": 8},
    "measured, one that many blocks have a part of": {"keys": [250, 2], "blocks": 9, "measured": [0]},
    "as it is tuned": {"keys": [33, 260, 1, 64], "form": MANY, "blocks": 6},
    "as it is tuned, measured": {"keys": [33, 260, 1, 64], "form": MANY, "blocks": 6, "measured": [1, 3]},
    "as it is tuned, a window": {"keys": [33, 260, 1, 64], "form": MANY, "group": LOCAL, "blocks": 5},
    "as it is tuned, all tiles one block's": {"keys": [150, 32, 65], "form": MANY, "blocks": 3},
    "twelve tiles ahead": {"keys": [900, 33], "form": FAR, "blocks": 4, "measured": [0]},
    "twelve tiles ahead, one alone": {"keys": [700], "form": FAR, "blocks": 8},
    "tiles ahead, more than the ring has": {"keys": [1700], "form": FAR, "blocks": 2},
    "twelve tiles ahead, a window": {"keys": [700], "form": FAR, "group": LOCAL, "window": 512},
    "as it is tuned, large heads": {"keys": [400, 65], "form": LARGE, "blocks": 3},
    "twelve tiles ahead, large heads": {"keys": [400, 65], "form": LARGE_FAR, "blocks": 3},
    "one warp, and eight queries for each key": {"keys": [33, 70, 200], "form": ALONE},
    "one warp, a window": {"keys": [70, 129], "group": LOCAL, "form": ALONE},
    "one query for each key": {"keys": [70, 100], "form": form(128, 2, 1, 32, cut(3, 3))},
    "blocks that no power of two is": {"keys": [97, 96, 20], "form": form(128, 3, 5, 96, cut(2, 2))},
    "tiles that are too few to be shared out": {"keys": [97, 40], "form": form(128, 1, 2, 32, cut(4, 4, 3))},
}


POOLS = {"bfloat16": torch.bfloat16, "FP8": FP8}
over_every_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)


def over(pool: torch.dtype, case: dict[str, Any]) -> dict[str, Any]:
    """The same over such a pool."""
    form = case.get("form", FORM)
    tuning = AS_TUNED_FP8.get(form.tuning, form.tuning) if pool == FP8 else form.tuning
    return case | {"form": replace(form, pool=pool, tuning=tuning)}


def right(case: SmallDecodes, seed: int) -> list[torch.Tensor]:
    results = case.run(seed)
    assert case.error(results) < BOUND, "wrong numbers"
    return results


@over_every_pool
@pytest.mark.parametrize("case", CASES)
def test_results_are_plain_attention_s_and_whoever_is_quick_no_bit_differs(case, pool):
    decodes = SmallDecodes(**over(pool, CASES[case]))
    first = right(decodes, seed=0)
    for seed in range(1, 5):
        assert all(map(torch.equal, decodes.run(seed), first)), f"with seed {seed}"


@over_every_pool
def test_with_nothing_to_do_all_is_left_as_it_is(pool):
    SmallDecodes(**over(pool, {"keys": [40, 3], "room": 4, "measured": [0], "idle": True})).run(seed=0)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_token_s_own_key_and_value_go_to_a_pool_in_fp8_as_others_write_them(head_dim):
    decodes = of_all_numbers(head_dim)
    assert decodes.error(decodes.run(seed=0)) == 0.0


def of_all_numbers(head_dim: int) -> SmallDecodes:
    """Sequences of one token, over a pool in FP8, with keys and values of all magnitudes, those that are no numbers and
    those in the middle of two included; results are the values."""
    decodes = SmallDecodes([1] * 8, layers=1, form=replace(form(head_dim, 2, 2, 32, cut(2, 4)), pool=FP8))
    _, *kv = decodes.split(0)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 448.0, 464.0, 465.0, -464.0, -1e30, -0.0])
    chosen = torch.cat([odd, torch.arange(-128, 128) * 2.0**-10]).bfloat16()
    for new in kv:
        numbers = (torch.arange(new.numel()) * 12_289 % 2**16).to(torch.int16).view(torch.bfloat16)
        numbers[: len(chosen)] = chosen
        new.copy_(numbers.view_as(new))
    return decodes


@given(
    keys=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    group=st.sampled_from(LayerGroup),
    window=st.integers(1, 100),
    blocks=st.integers(FORM.kv_heads, 12),
    idle=st.integers(0, 2),
    measures=st.booleans(),
    form=st.sampled_from([FORM, FORM_FP8]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_results_are_plain_attention_s_whatever_the_step(keys, group, window, blocks, idle, measures, form, seed):
    measured = range(0, len(keys), 2) if measures and group is LayerGroup.GLOBAL else ()
    right(SmallDecodes(keys, group, window, blocks, room=len(keys) + idle, measured=measured, form=form), seed)


class Planted(NamedTuple):
    """A mistake in the kernel, other words for the right ones, and what says that it was found, over which pool."""

    edits: tuple[tuple[str, str], ...]
    found: str
    form: Form = FORM


def planted(right: str, wrong: str, found: str) -> Planted:
    return Planted(((right, wrong),), found)


def planted_in_fp8(right: str, wrong: str, found: str) -> Planted:
    return Planted(((right, wrong),), found, FORM_FP8)


MEET = "    consumers_meet();\n"
PLANTED = {
    "a stage is not waited for": planted(
        "wait(ring.full(), ring.parity);", "", "race: .* reads shared memory .* a copy|nobody wrote it"
    ),
    "a stage is let go before it is read": planted(
        "wait(ring.full(), ring.parity);",
        "wait(ring.full(), ring.parity); if (lane == 0) arrive(ring.empty());",
        "race: a copy|arrival too many",
    ),
    "a lane speaks for others that it has not met": planted(
        "            __syncwarp();\n", "", "race: a copy .* writes .* read"
    ),
    "a phase's bit is the wrong one": planted("ring.parity ^ 1);", "ring.parity);", "nobody can go on"),
    "a stage is one warp's and then another's": Planted(
        (
            ('#include "ring.cuh"\n', '#include "ring.cuh"\n#undef STAGES\n#define STAGES 3\n'),
            ("STAGES % WARPS == 0", "true"),
        ),
        "race: .* reads shared memory .* a copy|nobody wrote it|wrong numbers",
    ),
    "the warps' places in the ring are not in turns": planted(
        "ring.skip(warp);", "ring.skip(0);", "race|wrong numbers|nobody can go on|arrival too many"
    ),
    "the kernel before is not waited for": planted("    wait_for_kernel_before();\n", "", "race: .* (out|parts|stats)"),
    "warps do not meet before their sums are read": planted(
        MEET + "    const auto put", "    const auto put", "race: .* shared memory|nobody wrote it"
    ),
    "warps do not meet before a block's part is told": planted(
        "    if (whole) return;\n" + MEET, "    if (whole) return;\n", "race: .* (parts|stats)"
    ),
    "warps do not meet before they ask who is last": planted(
        MEET + "    if (!load<u32>", "    if (!load<u32>", "race: .* shared memory|nobody wrote it"
    ),
    "a run's sums take the place of those of the run before": planted(
        "turn ^= 1", "turn ^= 0", "race: .* shared memory"
    ),
    "who counts neither releases nor acquires": planted(
        "added(counter, 1)",
        "(twin::add(counter, 1, twin::Order::relaxed), told(counter) - 1)",
        "race: .* (parts|stats)",
    ),
    "a counter is left as it is": planted("if (all) *counter = 0;", "", "does not begin with nothing"),
    "a part is read from the wrong place": planted("block == first)", "block != first)", "race|wrong numbers|masses"),
    "a part is left out": planted("block <= last;", "block < last;", "wrong numbers|masses"),
    "keys that are masked count": planted(
        "if (key < sequence.lowest || key >= sequence.fresh)", "if (false)", "wrong numbers|masses"
    ),
    "keys before the window count": planted("if (key < sequence.lowest || ", "if (", "wrong numbers|masses"),
    "the token's own key is left out": planted("run.ends() && warp == 0", "false", "nobody wrote|pool|wrong numbers"),
    "every warp takes the token's own key": planted("run.ends() && warp == 0", "run.ends()", "race: .* pool"),
    "every block takes the token's own key": planted("run.ends() && warp == 0", "warp == 0", "race: .* pool"),
    "the first block takes the token's own key, and the last one": planted(
        "run.ends() && warp == 0", "(run.ends() || run.first == 0) && warp == 0", "race: .* pool"
    ),
    "each lane counts the token's own key": planted("lane / 4 == 0 ? 1.0f : 0.0f", "1.0f", "wrong numbers|masses"),
    "the key that others write is copied": planted(
        "position + token < run.sequence.fresh;", "position + token <= run.sequence.fresh;", "race: .* pool"
    ),
    "all keys of a tile are copied": planted(
        "position + token < run.sequence.fresh;", "true;", "race: .* pool|wrong numbers"
    ),
    "a tile's mass goes to another's place": planted(
        "put(position / KEYS, member,", "put(position / KEYS / 2, member,", "race: .* mass|of masses|wrong masses"
    ),
    "a lane takes its own keys for all of a tile's": planted("sum = sum_of_column(sum);\n", "\n", "wrong masses"),
    "the mass of all is that of the greatest key": planted(
        "merged.top + __log2f(merged.whole)", "merged.top", "wrong masses"
    ),
    "the own key's mass is left out": planted("if (measurement.at && lane / 4 == 0)", "if (false)", "of masses"),
    "masses are written that nobody asked for": planted("if (begin >= 0) at", "at", "race: .* mass|masses"),
    "copies are announced before they are made": Planted(
        (
            ("            arrive_when_copied(ring.full());\n", ""),
            ("            wait(ring.empty(),", "            if (false) wait(ring.empty(),"),
            ("#pragma unroll\n            for (int i = 0; i < KEYS * PIECES",
             "            wait(ring.empty(), ring.parity ^ 1); arrive(ring.full());\n"
             "            for (int i = 0; i < KEYS * PIECES"),
        ),
        "race|nobody wrote",
    ),
}  # fmt: skip
PLANTED |= {
    "two values' channels are not told apart": planted_in_fp8(
        "BY_CHANNELS = 0x3120", "BY_CHANNELS = 0x3210", "wrong numbers"
    ),
    "a key's channels are not those of the queries": planted_in_fp8(
        "load_pairs(at + i * 32 + lane % 4 * 8)", "load_pairs(at + i * 32 + lane % 4 / 2 * 8)", "wrong numbers|masses"
    ),
    "the keys of a piece are another's": planted_in_fp8(
        "keys.z, keys.w, queries[i * 2 + 1]", "keys.z, keys.w, queries[i * 2]", "wrong numbers|masses"
    ),
    "later values of a piece are another's": planted_in_fp8(
        "values.x, values.z", "values.x, values.w", "wrong numbers"
    ),
    "queries stay in bfloat16": planted_in_fp8("return pack<true>(v.x, v.y);", "return pair;", "wrong numbers|masses"),
    "weights stay in bfloat16": planted_in_fp8(
        "pack<NARROW>(scores[half][0]", "pack<false>(scores[half][0]", "wrong numbers"
    ),
    "the token's own value is not rounded": planted_in_fp8(
        "four = raise_fp8_four(codes);", "four = {as_half(four.x), as_half(four.y)};", "wrong numbers|masses"
    ),
    "the token's own value is another channel's": planted_in_fp8(
        "NARROW ? lane / 8 :", "NARROW ? lane / 16 :", "wrong numbers"
    ),
    "the token's own numbers are too large to be kept": planted_in_fp8(
        "lower_fp8(v.x == v.x ? v.x : 0.0f, ", "lower_fp8(v.x * 2.0f, ", "pool|wrong masses"
    ),
    "a run's sums are laid out as bfloat16's": planted_in_fp8(
        "NARROW ? row * 2 + second :", "NARROW ? row + second * 8 :", "wrong numbers|race|nobody wrote"
    ),
}
STEPS: tuple[dict[str, Any], ...] = (
    {"keys": [330, 20, 70, 1, 33], "measured": [0, 2, 4]},
    {"keys": [100, 64, 65, 180, 32], "group": LOCAL, "blocks": 5},
)


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_found(mistake):
    text = TEXTS[SOURCE.name]
    for words, wrong in PLANTED[mistake].edits:
        assert words in text, "the kernel has changed: plant it anew"
        text = text.replace(words, wrong, 1)
    form = PLANTED[mistake].form
    decodes = [SmallDecodes(**step, form=form, texts=TEXTS | {SOURCE.name: text}) for step in STEPS]

    def run_often():
        for seed in range(24):
            for of_step in decodes:
                right(of_step, seed)

    with pytest.raises(AssertionError, match=PLANTED[mistake].found):
        run_often()
