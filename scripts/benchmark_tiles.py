"""Times tilings of the products of Gemma-3-27B's layers in turns, as an engine runs them; on a GPU.

    python -m scripts.benchmark_tiles bf16:16 fp8:16 int4:64 --json tiles.json

A layer is its four products and its small kernels, without attention; several of distinct weights are one CUDA graph,
as they are in a decode step. Each option changes the tilings of some roles. It is checked against float32, and its
layers against those of the tilings in use; then all are timed in rounds, one after the other, and last the best of each
role together. `--dry` goes the same way with small matrices on a CPU, under OpenAI Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor import matrix
from wicore_backend.executor.fp8_matrix import Fp8GpuMatrix
from wicore_backend.executor.int4_matrix import INT4_TILES, Int4GpuMatrix
from wicore_backend.executor.kernels.int4 import Int4Tile
from wicore_backend.executor.kernels.products import Tile
from wicore_backend.executor.kernels.small import qk_norm_rope
from wicore_backend.executor.matrix import Matrix
from wicore_backend.executor.plain_matrix import PlainMatrix
from wicore_backend.executor.roles import Role
from wicore_backend.models.gemma3.weights import Weight
from wicore_backend.quantization.fp8 import Fp8Matrix, quantized_fp8
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

Kind = Literal["bf16", "fp8", "int4"]
Way = Tile | Int4Tile | Literal["fp8"]
"""How a role's matrix multiplies: by a tiling; or, INT4 and many rows, in FP8."""
Tiles = Mapping[Role, Way]
_EPS = 1e-6
_WORSE, _APART = 1.25, 0.15
"""An option's error may be so many times that of the tiling in use; and its layers so far from theirs, for rows that
are quantised otherwise are as far from each other as from what they were, in each layer."""
_FP8_ERROR: Mapping[Role, float] = {"qkv": 4.2e-2, "out": 4.2e-2, "gate_up": 6e-2, "down": 4.2e-2}
"""What a product may have that quantises rows and weights which the way in use does not. Numbers of three bits of
fraction are off by 2.6% on average, and so products of two by 3.7%: 3.8e-2 was measured of FP8 weights themselves. What
GELU makes of the gate times the up has both errors, 5.4e-2."""
_FP8_APART = 0.25
"""And eight layers of such products, each of which takes in the errors of those before it: 0.145 in a small twin."""

ROLES: Sequence[Role] = ("qkv", "out", "gate_up", "down")


def _by_tilings(rows: int, roles: Sequence[Role]) -> Mapping[str, Tiles]:
    """For INT4: `roles`, each and all, by their tilings where `int4_wide` is in use."""
    tiles: dict[Role, Way] = {
        role: next(tile for most, tile in INT4_TILES[role].items() if rows <= most) for role in roles
    }
    return {f"{role}: by its tiling": {role: tile} for role, tile in tiles.items()} | {"all: by their tilings": tiles}


OPTIONS: Mapping[Kind, Mapping[int, Mapping[str, Tiles]]] = {
    "bf16": {
        16: {
            "gate-up: 6 stages": {"gate_up": Tile(64, 64, 6, 128)},
            "gate-up: 256 first": {"gate_up": Tile(64, 64, 5, 256)},
            "gate-up: 128 deep, 3 stages": {"gate_up": Tile(64, 128, 3, 128)},
            "down: 7 stages": {"down": Tile(64, 64, 7, 128, splits=2)},
            "down: whole": {"down": Tile(64, 64, 6, 128)},
            "out: 5 stages": {"out": Tile(64, 128, 5, 128, splits=2)},
            "QKV: 5 stages": {"qkv": Tile(64, 128, 5, 512)},
            "QKV: 256 first": {"qkv": Tile(64, 128, 6, 256)},
        }
    },
    "fp8": {
        16: {
            "gate-up: 4 stages": {"gate_up": Tile(64, 128, 4, 128)},
            "gate-up: 256 first": {"gate_up": Tile(64, 128, 3, 256)},
            "down: 6 stages": {"down": Tile(64, 128, 6, 256, splits=4)},
            "down: 3 parts": {"down": Tile(64, 128, 4, 256, splits=3)},
            "out: 6 stages": {"out": Tile(64, 128, 6, 256, splits=4)},
            "QKV: 256 deep, 6 stages": {"qkv": Tile(64, 256, 6, 256)},
        }
    },
    "int4": {
        **{rows: _by_tilings(rows, ("gate_up", "down")) for rows in (40, 48, 64)},
        **{rows: {"all: in FP8": dict.fromkeys(ROLES, "fp8")} for rows in (512, 8192)},
    },
}
"""By kind of weights and rows: neighbours of the tilings in use. What lost is told in docs/benchmarks."""

DRY_OPTIONS: Mapping[Kind, Mapping[str, Tiles]] = {
    "bf16": {"narrow": dict.fromkeys(("gate_up", "down"), Tile(32, 16, 3, 32))},
    "fp8": {
        "in parts": dict.fromkeys(("out", "down"), Tile(64, 32, 3, 32, splits=2)),
        "narrow": {"down": Tile(32, 32, 3, 32)},
    },
    "int4": {"narrow": dict.fromkeys(("gate_up", "down"), Int4Tile(32, 3, scaled=True))},
}
_DRY_BASE: Mapping[Kind, Tile | Int4Tile] = {
    "bf16": Tile(64, 32, 3, 64),
    "fp8": Tile(64, 32, 3, 64),
    "int4": Int4Tile(64, 3, scaled=True),
}


@dataclass(frozen=True)
class Shape:
    """Of a layer, and how it is measured."""

    hidden: int
    feed_forward: int
    query_heads: int
    kv_heads: int
    head_dim: int
    group: int
    layers: int
    rounds: int
    dtype: torch.dtype
    device: torch.device

    def of(self, role: Role) -> tuple[int, int]:
        """A matrix [N, K]."""
        attended = self.query_heads * self.head_dim
        sizes: Mapping[Role, tuple[int, int]] = {
            "qkv": (attended + 2 * self.kv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, attended),
            "gate_up": (2 * self.feed_forward, self.hidden),
            "down": (self.hidden, self.feed_forward),
        }
        return sizes[role]


CARD = Shape(5376, 21504, 32, 16, 128, 128, 8, 11, torch.bfloat16, torch.device("cuda"))
DRY = Shape(64, 128, 2, 1, 32, 32, 1, 1, torch.float16, torch.device("cpu"))
"""float16, since the interpreter multiplies bfloat16 as if its bits were integers."""


def random_weight(kind: Kind, role: Role, shape: Shape) -> Weight:
    """Under which activations stay as large as a trained model's."""
    rows, columns = shape.of(role)
    if kind == "int4":
        tiles = (rows // TILE_ROWS, columns // (2 * shape.group), TILE_ROWS)
        words = (*tiles, shape.group // 4)
        codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=shape.device)
        scales = (torch.rand(*tiles, 2, device=shape.device) + 0.5).mul_(0.15 * columns**-0.5)
        return Int4Matrix(codes, scales.to(shape.dtype), None, shape.dtype)
    weight = torch.randn(rows, columns, device=shape.device, dtype=shape.dtype).mul_(columns**-0.5)
    return quantized_fp8(weight) if kind == "fp8" else weight


class Layers:
    """Layers of distinct weights, and what `rows` tokens bring to the first."""

    def __init__(self, kind: Kind, rows: int, shape: Shape, *, layers: int | None = None) -> None:
        self._kind, self._rows, self._shape = kind, rows, shape
        count = shape.layers if layers is None else layers
        self._weights = [{role: random_weight(kind, role, shape) for role in ROLES} for _ in range(count)]
        device = shape.device
        self._hidden = torch.randn(rows, shape.hidden, device=device).to(shape.dtype)
        angles = torch.randn(rows, shape.head_dim // 2, device=device).repeat(1, 2)
        self._angles = angles.cos().to(shape.dtype), angles.sin().to(shape.dtype)
        self._norm = torch.rand(shape.hidden, device=device) + 0.5
        self._qk_norm = torch.rand(shape.query_heads + shape.kv_heads, shape.head_dim, device=device) + 0.5

    def with_tiles(self, tiles: Tiles) -> Callable[[], Tensor]:
        """The layers' work with these tilings, and those in use for other roles: the hidden state."""
        return partial(self._run, [self._matrices(weights, tiles) for weights in self._weights])

    def error(self, role: Role, tiles: Tiles) -> float:
        """Relative, of the first layer's product against float32."""
        weight = self._weights[0][role]
        x = torch.randn(self._rows, weight.shape[1], device=self._shape.device).to(self._shape.dtype)
        plain = weight if isinstance(weight, Tensor) else weight.dequantized(torch.float32)
        exact = x.float() @ plain.float().T
        if role == "gate_up":
            gate, up = exact.chunk(2, -1)
            exact = F.gelu(gate, approximate="tanh") * up
        ours = self._matrix(role, weight, tiles)(x).float()
        return float(((ours.sum(0) if ours.dim() == 3 else ours) - exact).norm() / exact.norm())

    def _run(self, layers: Sequence[Mapping[Role, Matrix]]) -> Tensor:
        hidden = self._hidden
        normed: Any = hidden
        norms = self._norm, self._norm, _EPS
        for nth, of in enumerate(layers):
            heads = of["qkv"](normed)
            qk_norm_rope(heads, self._qk_norm, *self._angles, _EPS)
            attended = heads[:, : self._shape.of("out")[1]]
            hidden, normed = matrix.add_norm(of["out"], attended, hidden, *norms, reader=of["gate_up"])
            fed = matrix.gated(of["gate_up"], normed, reader=of["down"])
            following = layers[(nth + 1) % len(layers)]["qkv"]
            hidden, normed = matrix.add_norm(of["down"], fed, hidden, *norms, reader=following)
        return hidden

    def _matrices(self, weights: Mapping[Role, Weight], tiles: Tiles) -> Mapping[Role, Matrix]:
        return {role: self._matrix(role, weight, tiles) for role, weight in weights.items()}

    def _matrix(self, role: Role, weight: Weight, tiles: Tiles) -> Matrix:
        tile = tiles.get(role)
        if tile is None and self._shape.device.type == "cpu":
            tile = _DRY_BASE[self._kind]
        if isinstance(weight, Int4Matrix):
            if tile == "fp8":
                return Int4GpuMatrix(role, weight, fp8_prefill=True)
            assert tile is None or (isinstance(tile, Int4Tile) and tile.fits(weight)), (role, tile)
            return Int4GpuMatrix(role, weight, tiles=None if tile is None else {self._rows: tile})
        assert isinstance(weight, Tensor | Fp8Matrix)
        values = weight if isinstance(weight, Tensor) else weight.values
        assert tile is None or (isinstance(tile, Tile) and tile.fits(values, gated=role == "gate_up")), (role, tile)
        of_rows = None if tile is None else {self._rows: (tile,)}
        if isinstance(weight, Tensor):
            return PlainMatrix(role, weight, tiles=of_rows)
        return Fp8GpuMatrix(role, weight, tiles=of_rows)


def timed(work: Callable[[], Any], shape: Shape) -> Callable[[], float]:
    """What measures `work` once, in microseconds: on a GPU as a graph."""
    if shape.device.type == "cpu":

        def on_cpu() -> float:
            began = time.perf_counter()
            work()
            return (time.perf_counter() - began) * 1e6

        return on_cpu
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e3

    replay()  # Once, to warm up.
    return replay


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> Mapping[str, list[float]]:
    """Each one's times, of rounds in which all are measured once."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return times


def measured(kind: Kind, rows: int, shape: Shape, options: Mapping[str, Tiles]) -> Iterator[dict[str, Any]]:
    """A row for the tilings in use, each option, and the best of each role together."""
    layers = Layers(kind, rows, shape)
    in_use = layers.with_tiles({})
    hidden = in_use().float()
    errors = {role: layers.error(role, {}) for role in ROLES}
    works = {"in use": timed(in_use, shape)}
    rows_of: dict[str, dict[str, Any]] = {"in use": {"errors": errors}}
    for name, tiles in options.items():
        own = {role: layers.error(role, tiles) for role in tiles}
        work = layers.with_tiles(tiles)
        apart = float((work().float() - hidden).norm() / hidden.norm())
        in_fp8 = {role for role in own if tiles[role] == "fp8"}
        most = {role: _FP8_ERROR[role] if role in in_fp8 else _WORSE * errors[role] + 1e-3 for role in own}
        wrong = any(not error < most[role] for role, error in own.items())
        wrong |= not apart < (_FP8_APART if in_fp8 else _APART)
        rows_of[name] = {"errors": own, "apart": apart, "wrong": wrong}
        if not wrong:
            works[name] = timed(work, shape)
    times = in_turns(works, shape.rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    best: dict[Role, str] = {}
    for name in sorted(set(medians) - {"in use"}, key=medians.__getitem__):
        if medians[name] < medians["in use"]:
            best |= {role: name for role in options[name] if role not in best}
    together: Tiles = {role: options[name][role] for role, name in best.items()}
    if len(set(best.values())) > 1:
        both = {"in use": works["in use"], "together": timed(layers.with_tiles(together), shape)}
        again = in_turns(both, shape.rounds)
        medians["together"] = (
            medians["in use"] * statistics.median(again["together"]) / statistics.median(again["in use"])
        )
        times = {**times, "together": again["together"]}
        rows_of["together"] = {"tiles": {role: str(tile) for role, tile in together.items()}}
    for name, row in rows_of.items():
        row |= {"kind": kind, "rows": rows, "option": name}
        if name in medians:
            row |= {
                "us": round(medians[name] / shape.layers, 2),
                "of in use": round(medians[name] / medians["in use"], 4),
                "spread": round((max(times[name]) - min(times[name])) / medians[name], 4),
            }
        yield row


def compile_option(job: tuple[Kind, int, str]) -> str | None:
    """Compile one option into the cache; what is wrong with it, if anything is."""
    kind, rows, name = job
    try:
        layers = Layers(kind, rows, CARD, layers=1)
        layers.with_tiles(OPTIONS[kind][rows].get(name, {}))()
        torch.cuda.synchronize()
    except Exception as error:  # Too much shared memory, registers: some do not fit the card.
        return f"{name}: {type(error).__name__}: {str(error)[:200]}"
    return None


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="kind:rows", help="such as bf16:16")
    parser.add_argument("--rounds", type=int, help="in which each option is timed once")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument("--dry", action="store_true", help="small matrices on a CPU, under the interpreter")
    parser.add_argument("--json", type=Path, help="where to write the results, too")
    args = parser.parse_args(arguments)
    shape = DRY if args.dry else CARD
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("a GPU is needed; --dry shows that the script works")
    chosen: list[tuple[Kind, int]] = []
    for what in args.what:
        kind, _, rows = what.partition(":")
        if kind not in OPTIONS or not rows.isdecimal() or int(rows) not in OPTIONS[kind]:
            known = ", ".join(f"{kind}:{rows}" for kind, by_rows in OPTIONS.items() for rows in by_rows)
            raise SystemExit(f"{what!r} has no options; there are some for {known}")
        chosen.append((kind, int(rows)))
    trouble: set[str] = set()
    if not args.dry:
        jobs = [(kind, rows, name) for kind, rows in chosen for name in ("in use", *OPTIONS[kind][rows])]
        with ProcessPoolExecutor(min(args.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            for job, wrong in zip(jobs, pool.map(compile_option, jobs), strict=True):
                if wrong is not None:
                    trouble.add(str(job))
                    print(*job[:2], wrong, flush=True)
    rows_out: list[dict[str, Any]] = []
    of_shape = replace(shape, rounds=args.rounds) if args.rounds and not args.dry else shape
    for kind, rows in chosen:
        options = DRY_OPTIONS[kind] if args.dry else OPTIONS[kind][rows]
        fitting = {name: tiles for name, tiles in options.items() if str((kind, rows, name)) not in trouble}
        for row in measured(kind, rows, of_shape, fitting):
            rows_out.append(row)
            error = max(row.get("errors", {"": 0.0}).values())
            figures = f"{row['us']:9.2f} us a layer {row['of in use']:7.4f}" if "us" in row else f"{'WRONG':>29}"
            print(f"{kind:5} {rows:4} {figures} error {error:.1e}  {row['option']} {row.get('tiles', '')}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows_out, indent=1))
    if any(row.get("wrong") for row in rows_out):
        raise SystemExit("an option is further from float32 than it may be")


if __name__ == "__main__":
    main()
