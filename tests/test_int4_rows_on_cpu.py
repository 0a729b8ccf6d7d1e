"""Products of a few rows with INT4 by the kernel for Hopper, compiled by g++: right in any order of its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hopper_twin
from tests.hopper_twin.small_products import TEXTS, SmallProduct
from wicore_backend.executor.int4_rows import SOURCE, Cut

pytestmark = pytest.mark.skipif(hopper_twin.gxx() is None, reason="needs g++")

BOUND = 5e-3
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "one block": ((5, 64, 512), {"cut": Cut(4, 1)}),
    "several blocks, the last with fewer tiles": ((8, 160, 768), {"cut": Cut(4, 1)}),
    "a last block with more warps than tiles": ((6, 160, 512), {"cut": Cut(8, 1)}),
    "inputs in splits": ((3, 64, 1280), {"cut": Cut(2, 3)}),
    "splits, the last block with fewer tiles": ((4, 96, 2560), {"cut": Cut(4, 2)}),
    "more spans than stages": ((3, 32, 3328), {"cut": Cut(2, 1)}),
    "more spans than stages, two pairs": ((3, 64, 3328), {"cut": Cut(4, 1)}),
    "fewer spans than parts": ((2, 32, 256), {"cut": Cut(2, 1)}),
    "gate and up": ((7, 192, 512), {"cut": Cut(4, 1), "gated": True}),
    "gate and up, the last block with fewer pairs": ((6, 224, 768), {"cut": Cut(6, 1), "gated": True}),
    "zero points": ((4, 64, 512), {"cut": Cut(4, 1), "zeros": True}),
    "float16 scales": ((3, 64, 512), {"cut": Cut(4, 1), "half_scales": True}),
    "float16 scales and zero points": ((2, 64, 512), {"cut": Cut(4, 1), "half_scales": True, "zeros": True}),
    "many tiles": ((2, 352, 1280), {"cut": Cut(22, 1)}),
    "one after the other": ((5, 256, 256), {"cut": Cut(8, 1), "launches": 2}),
}


def right(product: SmallProduct, seed: int) -> torch.Tensor:
    result = product.run(seed)
    assert product.error(result) < BOUND, "wrong numbers"
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_the_plain_twin_s_and_whoever_is_quick_no_bit_differs(case):
    sizes, more = CASES[case]
    product = SmallProduct(*sizes, **more)
    first = right(product, seed=0)
    for seed in range(1, 5):
        assert torch.equal(product.run(seed), first), f"with seed {seed}"


@given(
    rows=st.integers(2, 8),
    pairs=st.integers(1, 7),
    spans=st.integers(1, 13),
    processors=st.integers(2, 5),
    role=st.sampled_from(["qkv", "gate_up", "down"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_product_is_the_plain_twin_s_however_it_is_cut(rows, pairs, spans, processors, role, seed):
    cut = Cut.of(2 * pairs, spans, processors=processors, splits=role == "down")
    right(SmallProduct(rows, pairs * 32, spans * 256, cut=cut, gated=role == "gate_up"), seed)


@pytest.mark.parametrize("case", ["gate and up", "float16 scales and zero points", "inputs in splits"])
@pytest.mark.parametrize("scale", [1e-3, 1e5])
def test_activations_may_be_of_any_size(scale, case):
    """Those of trained models reach far beyond float16."""
    sizes, more = CASES[case]
    product = SmallProduct(*sizes, **more)
    product.memory *= scale
    right(product, seed=1)


@pytest.mark.parametrize("case", ["several blocks, the last with fewer tiles", "gate and up"])
def test_a_row_s_result_is_its_own_whoever_the_others_are(case):
    """Not a bit of it is another where fewer are there, or some that are no numbers: rows are of several requests."""
    sizes, more = CASES[case]
    product = SmallProduct(*sizes, **more)
    whole, rows = right(product, seed=2), product.memory
    product.memory = rows[:3].clone()
    assert torch.equal(product.run(seed=3), whole[:, :3])
    product.memory = rows.clone()
    product.memory[1] = float("nan")
    others = [n for n in range(len(rows)) if n != 1]
    result = product.run(seed=4)
    assert torch.equal(result[:, others], whole[:, others])
    assert bool(result[:, 1].isnan().all())


class Planted(NamedTuple):
    """A mistake in the kernel, other words for the right ones, and what says that it was found, in which case."""

    edits: tuple[tuple[str, str], ...]
    found: str
    case: str


def planted(right: str, wrong: str, found: str, case: str = "several blocks, the last with fewer tiles") -> Planted:
    return Planted(((right, wrong),), found, case)


FULL = "wait(ring.full(), ring.parity);"
LONG, SPLIT = "more spans than stages", "inputs in splits"
PREPARED = "prepare(WIDTH + 1, PAIRS)"
PLANTED = {
    "a stage is not waited for": planted(FULL, "", "race: .* reads shared memory .* a copy|nobody wrote it"),
    "a stage is let go before it is read": planted(
        FULL, FULL + " if (lane == 0) arrive(ring.empty());", "race: a copy|arrival too many", LONG
    ),
    "a stage is not asked to be empty": planted("        wait(ring.empty(), ring.parity ^ 1);\n", "", "race", LONG),
    "a lane speaks for others that it has not met": planted(
        "        __syncwarp();\n        if (lane == 0) arrive",
        "        if (lane == 0) arrive",
        "race: a copy .* writes .* read",
        LONG,
    ),
    "an empty stage's phase has the wrong bit": planted(
        "ring.parity ^ 1);", "ring.parity);", "nobody can go on|race", LONG
    ),
    "a full stage's phase has the wrong bit": planted(FULL, "wait(ring.full(), ring.parity ^ 1);", "nobody|race"),
    "a stage is one part's and then another's": Planted(
        (
            ('#include "ring.cuh"\n', '#include "ring.cuh"\n#undef STAGES\n#define STAGES 8\n'),
            ("STAGES % PARTS == 0", "true"),
        ),
        "race|nobody wrote it|wrong numbers|nobody can go on",
        "more spans than stages, two pairs",
    ),
    "the parts' places in the ring are not in turns": planted(
        "ring.skip(part);", "ring.skip(0);", "race|wrong numbers|nobody can go on|arrival too many"
    ),
    "warps do not meet before sums take the ring's place": planted(
        "    consumers_meet();  // Nobody reads the ring any more.\n", "", "race: .* shared memory"
    ),
    "warps do not meet before their sums are read": planted(
        "    consumers_meet();\n    wait_for", "    wait_for", "race: .* shared memory|nobody wrote it"
    ),
    "barriers are used before they are there": planted("    __syncthreads();\n", "", "no barrier|race"),
    "more bytes are announced than are copied": planted(
        "share.count * CODE_BYTES)", "TILES * CODE_BYTES)", "nobody can go on"
    ),
    "fewer bytes are announced than are copied": planted(
        "share.count * CODE_BYTES)", "CODE_BYTES)", "nobody can go on|race|arrival too many"
    ),
    "an arrival too few fills a stage": planted(
        PREPARED, "prepare(WIDTH, PAIRS)", "race|arrival too many|nobody|on their way"
    ),
    "an arrival too many fills a stage": planted(PREPARED, "prepare(WIDTH + 2, PAIRS)", "nobody can go on"),
    "an arrival too few empties a stage": planted(
        PREPARED, "prepare(WIDTH + 1, PAIRS - 1)", "race|arrival too many", "more spans than stages, two pairs"
    ),
    "an arrival too many empties a stage": planted(PREPARED, "prepare(WIDTH + 1, PAIRS + 1)", "nobody can go on", LONG),
    "rows count as copied when they are not": planted(
        "arrive_when_copied(ring.full());",
        "arrive_when_copied(ring.full()), arrive(ring.full());",
        "race|arrival too many",
    ),
    "rows are copied before the kernel before has ended": planted(
        "    wait_for_kernel_before();\n    ring = {};", "    ring = {};", "race: .* (out|x)", "one after the other"
    ),
    "one lane waits for the kernel before, and others copy": planted(
        "    wait_for_kernel_before();\n    ring = {};",
        "    if (threadIdx.x % WIDTH == 0) wait_for_kernel_before();\n    ring = {};",
        "race: .* (out|x)",
        "one after the other",
    ),
    "splits overlap": planted(
        "end(product.spans * (split + 1) / product.splits)",
        "end(min(product.spans, product.spans * (split + 1) / product.splits + 1))",
        "wrong numbers",
        SPLIT,
    ),
    "splits leave out a span": planted(
        "begin(product.spans * split / product.splits)",
        "begin(product.spans * split / product.splits + (split > 0))",
        "wrong numbers",
        SPLIT,
    ),
    "splits' parts lie at one place": planted(
        "(long long)share.split * product.rows", "0LL", "race: .* out|wrong numbers", SPLIT
    ),
}
PLANTED |= {
    "a row's halves are exchanged for who copies only": planted(
        "load<uint4>(x + swapped(quarter * 8 + half * 4 + of_row, row) * 16)",
        "load<uint4>(x + (quarter * 8 + half * 4 + of_row) * 16)",
        "wrong numbers",
    ),
    "a row's halves are exchanged for who reads only": planted("swapped(lane, row) * 16", "lane * 16", "wrong numbers"),
    "rows that are not there are no zeros": planted(
        "copy_rows(ring, product, span, ROWS)",
        "copy_rows(ring, product, span, product.rows)",
        "nobody wrote it",
        "one block",
    ),
    "rows are read that are not there": Planted(
        (("row < product.rows);", "true);"), ("if (row + 1 < product.rows) from", "from")),
        "outside|beyond",
        "one block",
    ),
    "rows that are not there are given": planted(
        "i < product.rows * features / 2", "i < ROWS * features / 2", "beyond out", "one block"
    ),
    "shared memory is read as if it were global": planted(
        "load<uint4>(x + swapped(quarter", "load_words(x + swapped(quarter", "outside of global memory"
    ),
    "zero points are read that are not there": planted(
        "if (ZEROS) next_zeros.load", "next_zeros.load", "outside of global memory"
    ),
    "zero points are those of the other group": planted(
        "high_zero = zero_of(zeros.high[tile], group)",
        "high_zero = zero_of(zeros.high[tile], 1 - group)",
        "wrong numbers",
        "zero points",
    ),
    "zero points are another output's": planted(
        "low_zero = zero_of(zeros.low[tile], group)",
        "low_zero = zero_of(zeros.high[tile], group)",
        "wrong numbers",
        "zero points",
    ),
    "zero points are not in the scales' type": planted(
        "? number_of(of_groups, group) :",
        "? (group ? unpack<false>(of_groups).y : unpack<false>(of_groups).x) :",
        "wrong numbers",
        "float16 scales and zero points",
    ),
    "scales are those of the other group": planted(
        "scales.high[tile], group)", "scales.high[tile], 1 - group)", "wrong numbers"
    ),
    "scales are another span's": planted("load_next(span + PARTS);", "load_next(span + 1);", "wrong numbers", LONG),
    "float16 scales are taken for bfloat16": planted(
        "unpack<SCALE_HALF>", "unpack<false>", "wrong numbers", "float16 scales"
    ),
    "tiles are multiplied that are not there": planted("if (there) add_span", "add_span", "nobody wrote it"),
    "tiles are copied that are not there": planted(
        "if (lane < share.count)", "if (lane < TILES)", "outside|race|nobody can go on"
    ),
    "tiles are given that are not there": planted(
        "        if (first + feature >= outputs) continue;\n", "", "race|beyond|wrong numbers"
    ),
    "a part is left out": planted("part = 0; part < SUMMANDS", "part = 1; part < SUMMANDS", "wrong numbers"),
    "gate and up change places": planted(
        "gelu_times(whole(row, gate), whole(row, gate + TILE))",
        "gelu_times(whole(row, gate + TILE), whole(row, gate))",
        "wrong numbers",
        "gate and up",
    ),
    "a pair of gate and up is not one of both": planted(
        "number % 2 * (product.tiles / 2)", "number % 2", "wrong numbers|outside", "gate and up"
    ),
    "the last pairs are counted as tiles": planted(
        "2 * min(PAIRS, product.tiles / 2 - first)",
        "2 * PAIRS",
        "outside|beyond|race|wrong numbers",
        "gate and up, the last block with fewer pairs",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_found(mistake):
    texts = {name: TEXTS[name] for name in (SOURCE.name, "int4_tiles.cuh")}
    for words, wrong in PLANTED[mistake].edits:
        assert sum(text.count(words) for text in texts.values()) == 1, "the kernel has changed: plant it anew"
        texts = {name: text.replace(words, wrong) for name, text in texts.items()}
    sizes, more = CASES[PLANTED[mistake].case]
    product = SmallProduct(*sizes, **more, texts=TEXTS | texts)

    def run_often():
        for seed in range(24):
            right(product, seed)

    with pytest.raises(AssertionError, match=PLANTED[mistake].found):
        run_often()


def test_a_ring_that_parts_do_not_share_evenly_is_not_compiled():
    product = SmallProduct(2, 32, 256, cut=Cut(4, 1))
    wrong = product.form.defines() | {"STAGES": product.form.parts + 1}
    with pytest.raises(RuntimeError, match="a stage is always the same part's"):
        hopper_twin.HostKernel(SOURCE, TEXTS, wrong, parameter="Product")
