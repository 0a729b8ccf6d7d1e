"""A layer as one kernel, compiled by g++: what it computes, and that no order of its parts changes that."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from scripts.benchmark_streamed_layer import Found, dry, table
from tests import hopper_twin
from tests.hopper_twin.small_layers import TEXTS, SmallLayers
from wicore_backend.executor.streamed_layer import MEASURED, Tuning

pytestmark = pytest.mark.skipif(hopper_twin.gxx() is None, reason="needs g++")

WAYS = {
    "bf16": ("bf16", MEASURED),
    "bf16 in stages of three spans": ("bf16", Tuning(warps=3)),
    "fp8": ("fp8", MEASURED),
    "fp8 in stages of two spans": ("fp8", Tuning(warps=2)),
    "int4": ("int4", MEASURED),
    "int4 in stages of a span": ("int4", Tuning(warps=1)),
    "int4 with zero points": ("int4 with zero points", MEASURED),
}


@pytest.fixture(params=WAYS, scope="module")
def case(request, tmp_path_factory):
    kind, tuning = WAYS[request.param]
    with torch.inference_mode():
        yield SmallLayers(tmp_path_factory.mktemp("model"), kind, tuning=tuning)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_two_layers_are_what_the_plain_twin_makes_of_them(case, scale):
    torch.manual_seed(1)
    hidden, attention = case.row(scale)
    assert max(case.errors(hidden, attention, case.run(hidden, attention, seed=7))) < 1e-2


def test_whoever_is_quick_or_slow_nothing_races_and_no_bit_differs(case):
    torch.manual_seed(2)
    hidden, attention = case.row()
    first = case.run(hidden, attention, seed=0)
    for seed in (1, 2):
        for ours, right in zip(case.run(hidden, attention, seed=seed), first, strict=True):
            assert all(map(torch.equal, ours, right)), f"with seed {seed}"


RING, PRODUCTS, LAYER = "streamed_ring.cuh", "streamed_products.cuh", "streamed_layer.cu"
MEETING = "streamed_meeting.cuh"


class Planted(NamedTuple):
    """Mistakes in the kernel, in each file's text other words for the right ones, and what says that it was found."""

    edits: tuple[tuple[str, str, str], ...]
    found: str
    kind: str = "int4"
    tuning: Tuning = MEASURED


def planted(file, right, wrong, found):
    return Planted(((file, right, wrong),), found)


PLANTED = {
    "weights are not waited for": planted(
        PRODUCTS, "wait(ring.full(), ring.parity);", "", "race: .* reads shared memory .* a copy"
    ),
    "a slot is let go before it is read": planted(
        PRODUCTS,
        "wait(ring.full(), ring.parity);",
        "wait(ring.full(), ring.parity); if (lane == 0) arrive(ring.empty());",
        "race: a copy|arrival too many",
    ),
    "a lane speaks for others that it has not met": planted(
        PRODUCTS, "        __syncwarp();\n", "", "race: a copy .* writes .* read"
    ),
    "a phase's bit is the wrong one": planted(RING, "ring.parity ^ 1);", "ring.parity);", "nobody can go on"),
    "a share is too long": planted(
        RING, "begins[blockIdx.x + 1]}", "begins[blockIdx.x + 1] + 2}", "beyond|outside|race|wrong numbers"
    ),
    "several lanes copy, of which one waits": Planted(
        (
            (LAYER, "else if (threadIdx.x == CONSUMERS)", "else if (threadIdx.x < CONSUMERS + TILE)"),
            (RING, "    wait(ring.empty(),", "    if (threadIdx.x == CONSUMERS) wait(ring.empty(),"),
            (RING, "    flight.take_off();", "    if (threadIdx.x == CONSUMERS) flight.take_off();"),
            (RING, "    arrive_expecting(", "    if (threadIdx.x == CONSUMERS) arrive_expecting("),
            (RING, "copy(to, from, spans", "if (threadIdx.x % WIDTH == row) copy(to, from, spans"),
        ),
        "race: a copy|arrival too many",
        "fp8",
    ),
    "what the layer before gives is not waited for": planted(
        LAYER, "wait_for_kernel_before();", "", "race|wrong numbers"
    ),
    "blocks meet, and nothing is released": Planted(
        (
            (
                MEETING,
                "add_released(layer.counters + matrix, 1)",
                "twin::add(layer.counters + matrix, 1, twin::Order::relaxed)",
            ),
        ),
        "race: .* reads told_",
    ),
    "another block's part of a tile is not waited for": planted(
        PRODUCTS,
        "while (((word = told(words + 2 * TILE + place)) ^ turn) & 1)",
        "word = told(words + 2 * TILE + place); if (0)",
        "wrong numbers",
    ),
    "a tile that another block began is given": planted(
        PRODUCTS, "    if (begin % STEPS) {", "    if (0) {", "race|wrong numbers|nobody can go on"
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_found(mistake, tmp_path):
    texts = dict(TEXTS)
    for file, right, wrong in PLANTED[mistake].edits:
        assert right in texts[file], "the kernel has changed: plant it anew"
        texts[file] = texts[file].replace(right, wrong, 1)
    with torch.inference_mode():
        case = SmallLayers(tmp_path, PLANTED[mistake].kind, tuning=PLANTED[mistake].tuning, texts=texts)
        torch.manual_seed(3)
        hidden, attention = case.row()

        def run_often():
            for seed in range(8):
                results = case.run(hidden, attention, seed)
                assert max(case.errors(hidden, attention, results)) < 1e-2, "wrong numbers"

        with pytest.raises(AssertionError, match=PLANTED[mistake].found):
            run_often()


def test_the_ways_to_compare_run_dry():
    ways = {"as it is": MEASURED, "with less on its way": Tuning(in_flight=4096)}
    found = list(dry(4, ways))
    assert [one.way for one in found] == list(ways)
    assert all(one.wrong is None and one.error < 1e-2 for one in found)
    header, *rows = table([*found, Found(4, "a third", wrong="relative error 0.3")]).splitlines()
    assert header.split() == ["bits", "way", "us", "a", "layer", "ratio", "error"]
    assert [row.split("  ")[-1].strip() for row in rows] == [f"{one.error:.1e}" for one in found] + [
        "relative error 0.3"
    ]
