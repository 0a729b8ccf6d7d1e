"""A layer as one kernel that attends itself, compiled by g++: what it computes, and that no order changes that."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests import hopper_twin
from tests.hopper_twin.attending_layers import AttendingLayers
from tests.hopper_twin.small_layers import TEXTS, SmallLayers
from wicore_backend.executor.streamed_layer import Tuning
from wicore_backend.hmt.fp8 import FP8

pytestmark = pytest.mark.skipif(hopper_twin.gxx() is None, reason="needs g++")

BOUND = 1e-2
BFLOAT16 = torch.bfloat16
SPREAD = Tuning(least=1)
TWO = Tuning(least=2)
ALONE = Tuning(least=10_000)
"""One block has all tiles of a head."""
LENGTHS = {
    "one key": (1, 50),
    "two": (2, 50),
    "a tile but for one": (32, 50),
    "a tile and its own key": (33, 50),
    "three tiles": (80, 1000),
    "many": (200, 1000),
    "a window": (100, 50),
    "a window of whole tiles": (96, 32),
    "a window of one key": (64, 1),
    "more tiles than warps, and than a ring has": (330, 1000),
    "a long window": (700, 400),
    "none yet": (0, 50),
}
FEW = ("one key", "a window", "more tiles than warps, and than a ring has")
WAYS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "bf16": ("bf16", BFLOAT16, {"tuning": SPREAD}),
    "bf16 over FP8": ("bf16", FP8, {"tuning": SPREAD}),
    "bf16, one block a head": ("bf16", BFLOAT16, {"tuning": ALONE}),
    "bf16 over FP8, one block a head": ("bf16", FP8, {"tuning": ALONE}),
    "bf16, two tiles a block": ("bf16", BFLOAT16, {"tuning": TWO, "block_size": 96}),
    "fp8": ("fp8", BFLOAT16, {"tuning": SPREAD}),
    "fp8 over FP8": ("fp8", FP8, {"tuning": SPREAD}),
    "int4": ("int4", BFLOAT16, {"tuning": ALONE}),
    "int4 over FP8": ("int4", FP8, {"tuning": SPREAD}),
    "int4 with zero points over FP8": ("int4 with zero points", FP8, {"tuning": SPREAD}),
}
CASES = [(way, length) for way in WAYS for length in (FEW if "fp8" in way or "int4" in way else LENGTHS)]


def made(directory, way, **more):
    kind, kv_dtype, settings = WAYS[way]
    return AttendingLayers(directory, kind, kv_dtype, **settings, **more)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """By way, each made once."""
    found: dict[str, AttendingLayers] = {}

    def of(way):
        if way not in found:
            found[way] = made(tmp_path_factory.mktemp("model"), way)
        return found[way]

    with torch.inference_mode():
        yield of


@pytest.mark.parametrize(("way", "length"), CASES)
def test_two_layers_are_what_the_plain_twin_makes_of_them_and_whoever_is_quick_no_bit_differs(way, length, layers):
    case = layers(way)
    keys, window = LENGTHS[length]
    token = case.token(keys=keys, window=window)
    first = case.attend(token, seed=0)
    assert max(token.errors(case, first)) < BOUND
    for ours, right in zip(case.attend(token, seed=1), first, strict=True):
        assert all(map(torch.equal, ours, right))


def test_layers_that_attend_and_layers_that_do_not_share_what_their_blocks_count(layers, tmp_path):
    attending = layers("bf16")
    plain = SmallLayers(tmp_path, "bf16", tuning=SPREAD, shape=attending.shape)
    assert plain.blocks == attending.blocks
    plain.layers = attending.layers
    torch.manual_seed(5)
    hidden, attention = plain.row()
    token = attending.token(keys=150, window=100)
    calls = attending.calls()
    alone = {"attend": attending.attend(token, seed=0), "plain": plain.run(hidden, attention, seed=0)}
    for turn, kind in enumerate(("attend", "plain", "plain", "attend", "attend", "plain", "attend")):
        if kind == "attend":
            results = attending.attend(token, turn, calls)
        else:
            results = plain.run(hidden, attention, turn, calls=calls)
        for ours, right in zip(results, alone[kind], strict=True):
            assert all(map(torch.equal, ours, right)), f"{kind}, after {turn} others"


# ---- Mistakes

LAYER, MEETING, OWN, TILES = "streamed_layer.cu", "streamed_meeting.cuh", "streamed_attention.cuh", "attention.cuh"


class Planted(NamedTuple):
    """A mistake in a file, other words for the right ones, and what says that it was found, in layers of which way."""

    file: str
    right: str
    wrong: str
    found: str
    way: str = "bf16"


PARTS = "race: .* (parts|stats)"
PLANTED = {
    "other blocks' parts are not waited for": Planted(
        LAYER, "meetings.hold_parts();", "consumers_meet();", PARTS + "|nobody wrote"
    ),
    "blocks meet, and nothing is released": Planted(
        MEETING, "add_released(counter, 1)", "twin::add(counter, 1, twin::Order::relaxed)", PARTS
    ),
    "whoever has no tile does not come to the meeting": Planted(
        LAYER, "meetings.hold_parts();", "if (part.count) meetings.hold_parts();", "nobody can go on|race"
    ),
    "the next launch's number is the same": Planted(
        LAYER, "if (ATTENDS) tell(layer.launches + 1, told(layer.launches + 1) + 1);", "", PARTS
    ),
    "a tile is not waited for": Planted(
        OWN, "wait(tiles_barrier(ring), ring.parity);", "", "race: .* reads shared memory .* a copy|nobody wrote it"
    ),
    "a stage of tiles is let go before they are read": Planted(
        OWN,
        "wait(tiles_barrier(ring), ring.parity);",
        "wait(tiles_barrier(ring), ring.parity); if (lane == 0) arrive(ring.empty());",
        "race: a copy|arrival too many",
    ),
    "a lane speaks for others that it has not met": Planted(
        OWN, "        __syncwarp();\n", "", "race: a copy .* writes .* read"
    ),
    "a stage's tiles are another phase's": Planted(
        OWN, "wait(ring.empty(), ring.parity ^ 1);", "wait(ring.empty(), ring.parity);", "nobody can go on"
    ),
    "a stage is not said to be full": Planted(OWN, "if (lane == 0) arrive(ring.full());", "", "nobody can go on"),
    "tiles are told of before they are copied": Planted(
        OWN, "arrive_when_copied(tiles_barrier(ring));", "arrive(tiles_barrier(ring));", "race|nobody wrote it"
    ),
    "weights begin where tiles are": Planted(
        LAYER, "copy_all(ring, layer);", "copy_all({}, layer);", "race|nobody can go on|wrong numbers|too many|outside"
    ),
    "a tile is two warps'": Planted(
        OWN, "if (slot < OF_STAGE && first", "if (slot <= OF_STAGE && first", "nobody wrote|wrong numbers|race|outside"
    ),
    "warps' sums are not waited for": Planted(
        OWN,
        "attention::leave(state, warp, stats, parts);\n    consumers_meet();",
        "attention::leave(state, warp, stats, parts);",
        "race: .* shared memory|nobody wrote it",
    ),
    "a warp's sums are left out": Planted(OWN, "of < softmaxes;", "of < softmaxes - 1;", "wrong numbers|pool"),
    "a part goes to another's place": Planted(
        OWN, "const int at = part.number * ATTENDED", "const int at = 0 * ATTENDED", PARTS + "|wrong numbers"
    ),
    "a part is left out": Planted(
        OWN, "first + j < parts && row.has(i)", "first + j < parts - 1 && row.has(i)", "wrong numbers"
    ),
    "parts weigh equally": Planted(
        OWN, "const float share = stat.y * exp2_quickly(stat.x - higher);", "const float share = 1.0f;", "wrong numbers"
    ),
    "the token's own key is left out": Planted(
        OWN, "return number == parts - 1;", "return false;", "nobody wrote|pool|wrong numbers"
    ),
    "every block takes the token's own key": Planted(
        OWN, "return number == parts - 1;", "return true;", "race: .* pool"
    ),
    "two warps take the token's own key": Planted(
        OWN, "warp == part.count % WARPS", "warp / 2 == part.count % WARPS / 2", "race: .* pool|wrong numbers"
    ),
    "the key that is written is copied": Planted(
        OWN, "at < part.sequence.fresh;", "at <= part.sequence.fresh;", "race: .* pool"
    ),
    "keys before the window count": Planted(TILES, "if (key < sequence.lowest || ", "if (", "wrong numbers"),
    "the tile of the token's own key is not masked": Planted(
        TILES, " || key >= sequence.fresh)", ")", "wrong numbers"
    ),
    "the kernel before is not waited for": Planted(LAYER, "    wait_for_kernel_before();\n", "", "race"),
    "the second tile of a stage is the first": Planted(
        OWN, "ring.memory() + slot * attention::TILE_BYTES;", "ring.memory();", "race|wrong numbers|nobody wrote",
        "bf16 over FP8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_found(mistake, tmp_path):
    planted = PLANTED[mistake]
    assert planted.right in TEXTS[planted.file], "the kernel has changed: plant it anew"
    texts = TEXTS | {planted.file: TEXTS[planted.file].replace(planted.right, planted.wrong)}
    with torch.inference_mode():
        case = made(tmp_path, planted.way, texts=texts)
        tokens = [case.token(keys=keys, window=window) for keys, window in ((150, 100), (700, 600), (2, 50))]

        def run_often():
            for seed in range(8):
                for token in tokens:
                    assert max(token.errors(case, case.attend(token, seed))) < BOUND, "wrong numbers"

        with pytest.raises(AssertionError, match=planted.found):
            run_often()
