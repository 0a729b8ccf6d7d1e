"""Times the products of Gemma-3-27B's layers with INT4 matrices, by tiling; on a GPU.

    python -m scripts.benchmark_int4_tiles --rows 1 8 16 64

A layer is its four products and its small kernels, without attention; eight of distinct weights are one CUDA graph, as
they are in a decode step. From the tilings in use, each role's are tried with the others at their best, and checked
against the plain twin. Prints the fastest of each, and the layer's time with all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.int4_matrix import INT4_TILES
from wicore_backend.executor.kernels.int4 import Int4Tile, int4_product
from wicore_backend.executor.kernels.small import add_norm, qk_norm_rope
from wicore_backend.executor.roles import Role
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

Tiles = Mapping[Role, Int4Tile]
_SHAPES: Mapping[Role, tuple[int, int]] = {
    "qkv": (8192, 5376),
    "out": (5376, 4096),
    "gate_up": (43008, 5376),
    "down": (5376, 21504),
}
_GROUP, _LAYERS, _HEAD_DIM, _QK_HEADS, _EPS = 128, 8, 128, 48, 1e-6
_TOLERANCE = 1e-2


def candidates(role: Role, rows: int) -> Iterator[Int4Tile]:
    """Tilings of `role` that may be fast with so many rows."""
    splits = (1, 2, 3, 4, 6) if role in ("out", "down") else (1,)
    if rows <= 8:
        ways = product((16, 32, 64), (3, 4), ((1, 1), (2, 2), (4, 4), (2, 1), (4, 1)), splits[:3], (False, True))
        for columns, stages, (warps, parts), split, early in ways:
            yield Int4Tile(columns, stages, warps, parts, split, early)
    else:
        shares = (
            ((64, 4), (128, 4), (128, 8), (256, 8)),
            (3, 4),
            splits,
            ((False, False), (False, True), (True, True)),
        )
        for (columns, warps), stages, split, (early, scaled) in product(*shares):
            yield Int4Tile(columns, stages, warps, 1, split, early, scaled)


def random_matrix(role: Role, device: torch.device) -> Int4Matrix:
    """Random codes under scales that keep activations as large as a trained model's."""
    rows, columns = _SHAPES[role]
    tiles = (rows // TILE_ROWS, columns // (2 * _GROUP), TILE_ROWS)
    codes = torch.randint(-(2**31), 2**31 - 1, (*tiles, _GROUP // 4), dtype=torch.int32, device=device)
    scales = (torch.rand(*tiles, 2, device=device) + 0.5).mul_(0.15 * columns**-0.5)
    return Int4Matrix(codes, scales.bfloat16(), None, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Layers:
    """Layers of distinct weights, and what `rows` tokens bring to the first."""

    weights: tuple[Mapping[Role, Int4Matrix], ...]
    hidden: Tensor
    angles: Tensor
    norm: Tensor
    qk_norm: Tensor

    @classmethod
    def random(cls, rows: int, device: torch.device) -> Layers:
        columns = _SHAPES["qkv"][1]
        return cls(
            weights=tuple({role: random_matrix(role, device) for role in _SHAPES} for _ in range(_LAYERS)),
            hidden=torch.randn(rows, columns, device=device).bfloat16(),
            angles=torch.randn(rows, _HEAD_DIM // 2, device=device).repeat(1, 2),
            norm=torch.rand(columns, device=device) + 0.5,
            qk_norm=torch.rand(_QK_HEADS, _HEAD_DIM, device=device) + 0.5,
        )

    def run(self, tiles: Tiles) -> None:
        hidden = normed = self.hidden
        cos, sin = self.angles.cos().bfloat16(), self.angles.sin().bfloat16()
        for weights in self.weights:
            heads = int4_product(normed, weights["qkv"], tiles["qkv"])
            qk_norm_rope(heads, self.qk_norm, cos, sin, _EPS)
            attended = int4_product(heads[:, : _SHAPES["out"][1]], weights["out"], tiles["out"])
            hidden, normed = add_norm(attended, hidden, self.norm, self.norm, _EPS)
            fed = int4_product(normed, weights["gate_up"], tiles["gate_up"], gated=True)
            fed = int4_product(fed, weights["down"], tiles["down"])
            hidden, normed = add_norm(fed, hidden, self.norm, self.norm, _EPS)

    def error(self, role: Role, tile: Int4Tile) -> float:
        """Relative, of the first layer's product against the plain twin in float32."""
        weight = self.weights[0][role]
        x = torch.randn(len(self.hidden), weight.shape[1], device=weight.device).bfloat16()
        theirs = x.float() @ weight.dequantized(torch.float32).T
        if role == "gate_up":
            gate, up = theirs.chunk(2, -1)
            theirs = F.gelu(gate, approximate="tanh") * up
        ours = int4_product(x, weight, tile, gated=role == "gate_up").float()
        return float(((ours.sum(0) if ours.dim() == 3 else ours) - theirs).norm() / theirs.norm())


def microseconds(work: Callable[[], None], replays: int = 9) -> float:
    """Of `work` as a CUDA graph, the median of its replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    times: list[float] = []
    with torch.cuda.graph(graph):
        work()
    for _ in range(replays + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3)
    return statistics.median(times[2:])


def compile_tile(rows: int, job: tuple[Role, Int4Tile]) -> str | None:
    """Compile one tiling into the cache; what is wrong with it, if anything is."""
    role, tile = job
    device = torch.device("cuda")
    try:
        x = torch.zeros(rows, _SHAPES[role][1], device=device, dtype=torch.bfloat16)
        int4_product(x, random_matrix(role, device), tile, gated=role == "gate_up")
        torch.cuda.synchronize()
    except Exception as error:  # Too much shared memory, registers: some do not fit the card.
        return f"{type(error).__name__}: {error}"
    return None


def tried(rows: int, role: Role, layers: Layers, best: Tiles, tiles: list[Int4Tile]) -> list[tuple[float, Int4Tile]]:
    """The layer's time with each of `tiles` in `role`, fastest first."""
    times = []
    for tile in tiles:
        if (error := layers.error(role, tile)) > _TOLERANCE:
            raise SystemExit(f"{role} of {rows} rows by {tile}: relative error {error:.1e}")
        times.append((microseconds(partial(layers.run, {**best, role: tile})) / _LAYERS, tile))
    return sorted(times, key=lambda timed: timed[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--roles", choices=_SHAPES, nargs="+", default=list(_SHAPES))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    for rows in args.rows:
        jobs = [(role, tile) for role in args.roles for tile in candidates(role, rows)]
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            wrong = list(pool.map(partial(compile_tile, rows), jobs))
        compiled = [job for job, trouble in zip(jobs, wrong, strict=True) if trouble is None]
        layers = Layers.random(rows, torch.device("cuda"))
        best = {role: next(tile for most, tile in INT4_TILES[role].items() if rows <= most) for role in _SHAPES}
        print(
            f"{rows} rows: {microseconds(partial(layers.run, best)) / _LAYERS:.1f} us a layer as they are", flush=True
        )
        for role in args.roles:
            times = tried(rows, role, layers, best, [tile for of, tile in compiled if of == role])
            best[role] = times[0][1]
            for time, tile in times[:4]:
                print(f"  {role} {time:.1f} {tile}", flush=True)
        print(f"  best {microseconds(partial(layers.run, best)) / _LAYERS:.1f} us a layer", flush=True)


if __name__ == "__main__":
    main()
