"""The tilings that are compared with those in use: each fits, compiles for Hopper, and goes the way that times it."""

from __future__ import annotations

import json

import pytest
import torch

from scripts import benchmark_tiles
from scripts.benchmark_tiles import CARD, OPTIONS
from tests.kernel_kit import HOPPER_SHARED_MEMORY, run_alone
from wicore_backend.executor.kernels.int4 import Int4Tile


def test_every_option_fits_the_matrices_of_the_27b_model():
    for kind, by_rows in OPTIONS.items():
        for options in by_rows.values():
            for name, tiles in options.items():
                for role, tile in tiles.items():
                    rows, columns = CARD.of(role)
                    weight = torch.empty(rows, columns, device="meta")
                    if tile == "fp8":
                        assert kind == "int4", name
                    elif isinstance(tile, Int4Tile):
                        assert tile.fits(weight), name
                    else:
                        assert tile.fits(weight, gated=role == "gate_up"), name


def test_options_of_each_kind_compile_for_hopper_and_bring_tiles_ahead():
    """A loop that is not pipelined, as one with a barrier in it, has no asynchronous copies."""
    lines = [line.split(maxsplit=3) for line in run_alone("tests.compile_tile_options").splitlines()]
    assert {name.split(":")[0] for *_, name in lines} == {"bf16", "fp8"}, "INT4 has none but tilings in use"
    for shared, products, copies, name in lines:
        assert int(shared) <= HOPPER_SHARED_MEMORY, name
        assert int(products) > 0, name
        assert int(copies) > 0, name


def test_options_are_checked_and_timed_in_turns(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here; the dry way is that of the interpreter")
    written = tmp_path / "tiles.json"
    benchmark_tiles.main(["bf16:16", "fp8:16", "int4:512", "--dry", "--json", str(written)])
    rows = json.loads(written.read_text())
    assert [row["option"] for row in rows if row["kind"] == "fp8"][:3] == ["in use", "in parts", "narrow"]
    assert all(row["us"] > 0 and not row.get("wrong") for row in rows)
    assert all(0 < error < 0.1 for row in rows for error in row.get("errors", {}).values())
    assert "int4" in capsys.readouterr().out


def test_an_option_that_computes_something_else_is_not_timed(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the dry way is that of the interpreter")
    error = benchmark_tiles.Layers.error
    monkeypatch.setattr(
        benchmark_tiles.Layers, "error", lambda self, role, tiles: error(self, role, tiles) + (1.0 if tiles else 0.0)
    )
    written = tmp_path / "tiles.json"
    with pytest.raises(SystemExit, match="float32"):
        benchmark_tiles.main(["bf16:16", "--dry", "--json", str(written)])
    assert [("us" in row, row.get("wrong", False)) for row in json.loads(written.read_text())] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("what", ["bf16", "bf16:17", "fp4:16", "bf16:x"])
def test_what_has_no_options_is_refused_with_those_that_have(what):
    with pytest.raises(SystemExit, match="bf16:16"):
        benchmark_tiles.main([what, "--dry"])
