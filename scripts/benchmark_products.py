"""Times the products of many rows of a layer of Gemma-3-27B in bfloat16, under sustained load; on a Hopper GPU.

    python -m scripts.benchmark_products --rows 512 1024 2048 4096 8192 --json products.json

Each role's product, and all four of a layer: by cuBLAS, with GELU after it, and by `WideProduct`. Layers of distinct
weights are one CUDA graph. Each way is first compared with float32. Then they are timed in turns: for a third of the
time to warm up, as the card's clock follows its power, and then for `--seconds`, with the clock and power that NVML
tells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmark_tiles import CARD, ROLES
from scripts.card_clock import CardClock
from wicore_backend.executor.kernels.small import gated, overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.executor.wide_product import WideProduct

_LAYERS = 3
_ERROR = 1e-2
_COMPARED_ROWS = 512
"""Of a product with float32, whose result is twice as large: the first and the last."""

Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Timing:
    """Of a role's product or a `layer`, by a way: microseconds each, in each round, and the card meanwhile."""

    rows: int
    what: str
    way: str
    microseconds: Sequence[float]
    tflops: float
    clock: Mapping[str, Any] | None

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    def __str__(self) -> str:
        clock = "" if self.clock is None else f"{self.clock['sm_mhz']} MHz {self.clock['watts']} W"
        each = " ".join(f"{us:.1f}" for us in self.microseconds)
        figures = f"{self.median:9.1f} us {self.tflops:6.1f} TFLOP/s"
        return f"{self.rows:5} {self.what:8} {self.way:7} {figures} {clock} [{each}]"


class Layers:
    """Some layers' weights, and what each role's product of `rows` reads."""

    def __init__(self, rows: int, weights: Sequence[Mapping[Role, Tensor]]) -> None:
        self._x = {
            role: torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
            for role, weight in weights[0].items()
        }
        self.flops = {role: 2 * rows * weight.numel() for role, weight in weights[0].items()}
        self._ways: Mapping[str, Sequence[Mapping[Role, Way]]] = {
            "cuBLAS": [{role: partial(_by_cublas, role, of[role]) for role in ROLES} for of in weights],
            "wide": [{role: WideProduct(of[role], gated=role == "gate_up") for role in ROLES} for of in weights],
        }

    def works(self, roles: Sequence[Role]) -> Mapping[str, Callable[[], None]]:
        """By way, what multiplies all layers' matrices of these roles once."""
        return {way: partial(self._all, layers, roles) for way, layers in self._ways.items()}

    def errors(self, weights: Mapping[Role, Tensor]) -> Iterator[tuple[str, Role, float]]:
        """Of each way and role, with the first layer's `weights`: relative, against float32."""
        for way, layers in self._ways.items():
            for role, x in self._x.items():
                ours = layers[0][role](x)
                worst = 0.0
                for part in (slice(0, _COMPARED_ROWS), slice(-_COMPARED_ROWS, None)):
                    exact = x[part].float() @ weights[role].float().T
                    exact = gated(exact) if role == "gate_up" else exact
                    worst = max(worst, float((ours[part].float() - exact).norm() / exact.norm()))
                yield way, role, worst

    def _all(self, layers: Sequence[Mapping[Role, Way]], roles: Sequence[Role]) -> None:
        for layer in layers:
            for role in roles:
                layer[role](self._x[role])


def _by_cublas(role: Role, weight: Tensor, x: Tensor) -> Tensor:
    product = F.linear(x, weight)
    return gated(product) if role == "gate_up" else product


def graph_of(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def sustained(graph: torch.cuda.CUDAGraph, seconds: float) -> tuple[float, tuple[float, float]]:
    """Microseconds of a replay, and from when to when of `time.perf_counter` they were measured."""

    def replays(count: int) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        for _ in range(count):
            graph.replay()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e3 / count

    replays(1)
    count = max(1, round(seconds * 1e6 / replays(3)))
    replays(max(1, count // 3))
    start = time.perf_counter()
    microseconds = replays(count)
    return microseconds, (start, time.perf_counter())


def timings(rows: int, layers: Layers, *, seconds: float, rounds: int, clock: CardClock) -> Iterator[Timing]:
    """Of each role and of a layer, each way in turns."""
    measured: Sequence[tuple[str, Sequence[Role]]] = [*((role, [role]) for role in ROLES), ("layer", ROLES)]
    for what, roles in measured:
        graphs = {way: graph_of(work) for way, work in layers.works(roles).items()}
        times: dict[str, list[float]] = {way: [] for way in graphs}
        spans: dict[str, list[tuple[float, float]]] = {way: [] for way in graphs}
        for _ in range(rounds):
            for way, graph in graphs.items():
                microseconds, span = sustained(graph, seconds)
                times[way].append(microseconds / _LAYERS)
                spans[way].append(span)
        flops = sum(layers.flops[role] for role in roles)
        for way, each in times.items():
            tflops = flops / statistics.median(each) / 1e6
            yield Timing(rows, what, way, each, tflops, clock.between(*spans[way]))


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--seconds", type=float, default=0.3, help="that each way is timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the results, too")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not overlaps(torch.empty(0, device="cuda")):
        raise SystemExit("a Hopper GPU is needed")
    torch.manual_seed(0)
    weights = [
        {role: torch.randn(CARD.of(role), device="cuda", dtype=CARD.dtype) * CARD.of(role)[1] ** -0.5 for role in ROLES}
        for _ in range(_LAYERS)
    ]
    found: list[Timing] = []
    wrong = False
    with CardClock(f"GPU-{torch.cuda.get_device_properties(0).uuid}") as clock:
        for rows in args.rows:
            layers = Layers(rows, weights)
            for way, role, error in layers.errors(weights[0]):
                if not error < _ERROR:
                    wrong = True
                    print(f"{rows:5} {role:8} {way:7} WRONG: {error:.1e} from float32", flush=True)
            for timing in timings(rows, layers, seconds=args.seconds, rounds=args.rounds, clock=clock):
                print(timing, flush=True)
                found.append(timing)
            if args.json:
                args.json.write_text(json.dumps([asdict(timing) for timing in found], indent=1))
    if wrong:
        raise SystemExit("a way is further from float32 than it may be")


if __name__ == "__main__":
    main()
