"""Products of 33 to 64 rows with INT4 by the kernel for Hopper, compiled by g++: right in any order of its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests import hopper_twin
from tests.hopper_twin.wide_products import TEXTS, WideProductOfInt4
from wicore_backend.executor.int4_wide import SOURCE, Cut

pytestmark = pytest.mark.skipif(hopper_twin.gxx() is None, reason="needs g++")

BOUND = 5e-3
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "fewer tiles than a block's": ((40, 96, 512), {"cut": Cut(2, 1)}),
    "several blocks, the last with fewer tiles": ((64, 352, 512), {"cut": Cut(2, 1)}),
    "inputs in splits": ((33, 288, 1280), {"cut": Cut(2, 2)}),
    "more spans than stages": ((50, 256, 2304), {"cut": Cut(2, 1)}),
    "gate and up": ((64, 320, 512), {"cut": Cut(2, 1), "gated": True}),
    "zero points": ((48, 256, 512), {"cut": Cut(2, 1), "zeros": True}),
    "float16 scales and zero points": ((33, 256, 512), {"cut": Cut(2, 1), "half_scales": True, "zeros": True}),
    "three warpgroups": ((63, 384, 1280), {"cut": Cut(3, 1), "gated": True, "zeros": True}),
    "one after the other": ((34, 256, 256), {"cut": Cut(2, 1), "launches": 2}),
}


def right(product: WideProductOfInt4, seed: int) -> torch.Tensor:
    result = product.run(seed)
    assert product.error(result) < BOUND, "wrong numbers"
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_the_plain_twin_s_and_whoever_is_quick_no_bit_differs(case):
    sizes, more = CASES[case]
    product = WideProductOfInt4(*sizes, **more)
    first = right(product, seed=0)
    for seed in range(1, 4):
        assert torch.equal(product.run(seed), first), f"with seed {seed}"


def test_a_row_s_result_is_its_own_whoever_the_others_are():
    sizes, more = CASES["gate and up"]
    product = WideProductOfInt4(*sizes, **more)
    whole, rows = right(product, seed=2), product.memory
    product.memory = rows[:35].clone()
    assert torch.equal(product.run(seed=3), whole[:, :35])
    product.memory = rows.clone()
    product.memory[1] = float("nan")
    others = [n for n in range(len(rows)) if n != 1]
    result = product.run(seed=4)
    assert torch.equal(result[:, others], whole[:, others])
    assert bool(result[:, 1].isnan().all())


class Planted(NamedTuple):
    """A mistake in the kernel, other words for the right ones, and what says that it was found, in which case."""

    right: str
    wrong: str
    found: str
    case: str = "several blocks, the last with fewer tiles"


LONG = "more spans than stages"
ENDED = "        wgmma_wait<0>();\n        if (lane == 0) arrive(rows.empty());\n"
READ = (
    "        words.load(codes.memory(), in_half);\n"
    "        __syncwarp();\n"
    "        if (lane == 0) arrive(codes.empty());\n"
)
WEIGHTS = "        wait(ring.empty(), ring.parity ^ 1);\n        arrive_expecting(ring.full(), 2 * HALF_BYTES);\n"
ROWS = "        wait(ring.empty(), ring.parity ^ 1);\n        arrive_expecting(ring.full(), 4 * X_BYTES);\n"
PLANTED = {
    "weights are not waited for": Planted("wait(codes.full(), codes.parity);", "", "race|nobody wrote it"),
    "rows are not waited for": Planted("wait(rows.full(), rows.parity);", "", "race|nobody wrote it"),
    "weights are let go before their words are taken": Planted(
        READ,
        "        if (lane == 0) arrive(codes.empty());\n        words.load(codes.memory(), in_half);\n",
        "race|arrival too many",
        LONG,
    ),
    "a lane speaks for others that it has not met": Planted(
        READ, READ.replace("        __syncwarp();\n", ""), "race: a copy .* writes .* read", LONG
    ),
    "rows are let go before the products have ended": Planted(
        ENDED, "        if (lane == 0) arrive(rows.empty());\n        wgmma_wait<0>();\n", "race|arrival too many", LONG
    ),
    "weights' stages are not asked to be empty": Planted(WEIGHTS, WEIGHTS.split("\n", 1)[1], "race|arrival", LONG),
    "rows' stages are not asked to be empty": Planted(ROWS, ROWS.split("\n", 1)[1], "race|arrival", LONG),
    "registers are made anew while products read them": Planted(
        "                wgmma_wait<1>();", "                ;", "wrong numbers"
    ),
    "sums are given before the products have ended": Planted(
        ENDED,
        "        wgmma_wait<1>();\n        if (lane == 0) arrive(rows.empty());\n",
        "race|wrong numbers|nobody",
        LONG,
    ),
    "fewer bytes of weights are expected than come": Planted(
        "arrive_expecting(ring.full(), 2 * HALF_BYTES)",
        "arrive_expecting(ring.full(), HALF_BYTES)",
        "nobody can go on|race|arrival too many|nobody wrote it",
    ),
    "fewer bytes of rows are expected than come": Planted(
        "arrive_expecting(ring.full(), 4 * X_BYTES)",
        "arrive_expecting(ring.full(), 3 * X_BYTES)",
        "nobody can go on|race|arrival too many|nobody wrote it",
    ),
    "more bytes of rows are expected than come": Planted(
        "arrive_expecting(ring.full(), 4 * X_BYTES)", "arrive_expecting(ring.full(), 5 * X_BYTES)", "nobody can go on"
    ),
    "an arrival too few empties the rows' stages": Planted(
        "Rows::prepare(1, WARPGROUPS * WARPS)",
        "Rows::prepare(1, WARPGROUPS * WARPS - 1)",
        "race|arrival too many",
        LONG,
    ),
    "rows are copied before the kernel before has ended": Planted(
        "    wait_for_kernel_before();\n    Rows ring;", "    Rows ring;", "race: .* (out|x)", "one after the other"
    ),
    "warps do not meet before sums take the rings' place": Planted(
        "    meet<1, CONSUMERS>();  // Nobody reads the rings any more.\n", "", "race: .* shared memory"
    ),
    "warps do not meet before their sums are read": Planted(
        "    meet<1, CONSUMERS>();\n    wait_for", "    wait_for", "race: .* shared memory|nobody wrote it"
    ),
    "barriers are used before they are there": Planted("    __syncthreads();\n", "", "no barrier|race"),
    "words lie as if they had not been exchanged": Planted("(piece ^ row) * 16", "piece * 16", "wrong numbers"),
    "a half's tiles are the other's": Planted(
        "at + half * HALF_BYTES +", "at + (1 - half) * HALF_BYTES +", "wrong numbers"
    ),
    "scales are another lane's": Planted("first + half * 2 + 1)", "first + half * 2)", "wrong numbers"),
    "scales are another span's": Planted("next.load(span + 1);", "next.load(span);", "wrong numbers", LONG),
    "zero points are read that are not there": Planted("if (ZEROS) zero =", "zero =", "outside of global memory"),
    "zero points are another output's": Planted(
        "zero_of(low_zero, group) : MIDDLE", "zero_of(high_zero, group) : MIDDLE", "wrong numbers", "zero points"
    ),
    "gate and up are not the same tile's": Planted(
        "product.tiles / 2 : HALF_TILES", "HALF_TILES : HALF_TILES", "wrong numbers", "gate and up"
    ),
    "splits leave out a span": Planted(
        "begin(product.spans * split / product.splits)",
        "begin(product.spans * split / product.splits + (split > 0))",
        "wrong numbers",
        "inputs in splits",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_found(mistake):
    words, wrong, found, case = PLANTED[mistake]
    text = TEXTS[SOURCE.name]
    assert text.count(words) == 1, "the kernel has changed: plant it anew"
    sizes, more = CASES[case]
    product = WideProductOfInt4(*sizes, **more, texts=TEXTS | {SOURCE.name: text.replace(words, wrong)})

    def run_often():
        for seed in range(16):
            right(product, seed)

    with pytest.raises(AssertionError, match=found):
        run_often()
