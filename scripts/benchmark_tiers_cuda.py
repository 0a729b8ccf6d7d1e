"""How fast KV blocks move between a GPU and host memory, and how much of that hides behind the steps.

    python -m scripts.benchmark_tiers_cuda --json build/tiers-on-gpu.json

Pools of Gemma-3-27B's shape with random bytes, no weights. A step is 62 layers, each `KVPools.wait` and then some
matrix products: of 512 tokens (0.7 ms a layer on an H200: a chunk of a prompt), or of one (as many bytes read as a
layer has weights: a decode). Times are from the call of `apply` on; medians of `--rounds`.

- *alone*: the last block has come, no step beside it. *first layer*: when that can begin.
- *step*: the step alone; *together*: the step that waits for the blocks; *hidden*: of the shorter of the two, how much
  went on beside the other.
- *in order*: how it was before: each block copied on the step's stream, then the step.
- Spills: the step with so many blocks given up before it, alone and in order.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from wicore_backend.hmt.codecs import CodecName
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools
from wicore_backend.hmt.transfers import Route, Transfer

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL


def layout_of(layers: int, block_size: int) -> KVLayout:
    """Gemma-3-27B's, or its first layers."""
    groups = [G if (layer + 1) % 6 == 0 else L for layer in range(layers)]
    return KVLayout.of(groups, block_size=block_size, kv_heads=16, head_dim=128, window=1024, bytes_per_value=2)


@dataclass(slots=True)
class Run:
    """One measurement, in ms."""

    issued: float = 0.0
    first_layer: float = 0.0
    all_done: float = 0.0


@dataclass(slots=True)
class Restore:
    """Of one prefix, from the host tier. Times in ms."""

    tokens: int
    codec: CodecName
    slot_bytes: int
    alone: float
    gigabytes_per_second: float
    first_layer: float
    issued: float
    steps: dict[str, dict[str, float]] = field(default_factory=dict)


class Bench:
    """Pools with what is in them, and steps over them."""

    def __init__(
        self, layout: KVLayout, blocks: dict[LayerGroup, int], codec: CodecName, device: torch.device, *, hidden: int
    ) -> None:
        self.layout = layout
        self.device = device
        self.pools = KVPools.allocate(
            layout, {g: n + 1 for g, n in blocks.items()}, blocks, device=device, dtype=torch.bfloat16, host_codec=codec
        )
        for pool in self.pools.tensors.values():
            for block in pool:
                block.normal_()
        self.blocks = blocks
        self.chunk = torch.randn(512, hidden, device=device, dtype=torch.bfloat16)
        # As many values as a layer has: three matrices of the MLP, and about half of one for attention's.
        self.weights = torch.randn(hidden, 14 * hidden, device=device, dtype=torch.bfloat16)
        self.rng = random.Random(0)
        self.move(self.transfers(Route.DEVICE_TO_HOST, blocks))()  # Slots need bytes that can be decoded.
        self.synchronize()

    def move(self, transfers: Sequence[Transfer]) -> Callable[[], None]:
        return self.pools.apply(transfers) or (lambda: None)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def transfers(self, route: Route, counts: dict[LayerGroup, int]) -> list[Transfer]:
        """Of so many blocks, in and out of slots anywhere."""
        listed = []
        for group, count in counts.items():
            slots = self.rng.sample(range(self.blocks[group]), count)
            blocks = self.rng.sample(range(1, self.blocks[group] + 1), count)
            pairs = (
                zip(slots, blocks, strict=True) if route is Route.HOST_TO_DEVICE else zip(blocks, slots, strict=True)
            )
            listed += [Transfer(route, group, source, target) for source, target in pairs]
        return listed

    def chunk_layer(self) -> None:
        torch.mm(self.chunk, self.weights)

    def decode_layer(self) -> None:
        torch.mm(self.chunk[:1], self.weights)

    def no_layer(self) -> None:
        pass

    def run(self, transfers: Sequence[Transfer], layer: Callable[[], None], *, in_order: bool = False) -> Run:
        """A step with transfers before it."""
        self.synchronize()
        marks: list[Mark] = [Mark(self.device)]
        began = time.perf_counter()
        if in_order:
            copy_in_order(self.pools, transfers)
        elif transfers:
            self.pools.apply(transfers)
        issued = time.perf_counter() - began
        for number in range(len(self.layout.layers)):
            self.pools.wait(number)
            if number == 0:
                marks.append(Mark(self.device))
            layer()
        marks.append(Mark(self.device))
        self.synchronize()
        return Run(issued * 1e3, marks[0].until(marks[1]), marks[0].until(marks[2]))

    def runs(self, transfers: Sequence[Transfer], layer: Callable[[], None], rounds: int, **how: bool) -> Run:
        """The median of several, after one that nobody counts."""
        runs = [self.run(transfers, layer, **how) for _ in range(rounds + 1)][1:]
        return Run(*(median(getattr(run, name) for run in runs) for name in ("issued", "first_layer", "all_done")))

    def written_after(self, transfers: Sequence[Transfer]) -> float:
        """Seconds until the slots hold what is given up."""
        self.synchronize()
        began = time.perf_counter()
        self.move(transfers)()
        return time.perf_counter() - began

    def close(self) -> None:
        self.pools.close()


class Mark:
    """A moment on the step's stream."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._now = time.perf_counter()

    def until(self, later: Mark) -> float:
        """Milliseconds."""
        if self._event is not None:
            return float(self._event.elapsed_time(later._event))
        return (later._now - self._now) * 1e3


def copy_in_order(pools: KVPools, transfers: Sequence[Transfer]) -> None:
    """What `KVPools.apply` did before it had streams; for exact blocks."""
    for transfer in transfers:
        blocks, slots = pools.tensors[transfer.group], pools.host[transfer.group]
        source, target = (slots, blocks) if transfer.route is Route.HOST_TO_DEVICE else (blocks, slots)
        target[transfer.target].copy_(source[transfer.source], non_blocking=True)


def measure_restores(bench: Bench, codec: CodecName, prefixes: Sequence[int], rounds: int) -> list[Restore]:
    layout, results = bench.layout, []
    steps = {"chunk": bench.chunk_layer, "decode": bench.decode_layer}
    alone = {name: bench.runs([], layer, rounds).all_done for name, layer in steps.items()}
    for tokens in prefixes:
        counts = {G: tokens // layout.block_size, L: layout.blocks_for(layout.window) + 1}
        transfers = bench.transfers(Route.HOST_TO_DEVICE, counts)
        size = sum(count * bench.pools.host[group][0].nbytes for group, count in counts.items())
        run = bench.runs(transfers, bench.no_layer, rounds)
        result = Restore(tokens, codec, size, run.all_done, size / run.all_done / 1e6, run.first_layer, run.issued)
        for name, layer in steps.items():
            together = bench.runs(transfers, layer, rounds)
            shorter = min(run.all_done, alone[name])
            step = {
                "step": alone[name],
                "together": together.all_done,
                "hidden": (run.all_done + alone[name] - together.all_done) / shorter,
            }
            if codec == "exact":
                step["in_order"] = bench.runs(transfers, layer, rounds, in_order=True).all_done
            result.steps[name] = step
        results.append(result)
    return results


def measure_spills(bench: Bench, codec: CodecName, rounds: int) -> dict[str, Any]:
    """How fast blocks go down, and what steps before which some are given up take."""
    many = bench.transfers(Route.DEVICE_TO_HOST, {G: bench.blocks[G] // 2})
    size = len(many) * bench.pools.host[G][0].nbytes
    seconds = median([bench.written_after(many) for _ in range(rounds + 1)][1:])
    result: dict[str, Any] = {"codec": codec, "bytes": size, "gigabytes_per_second": size / seconds / 1e9}
    for name, layer in (("chunk", bench.chunk_layer), ("decode", bench.decode_layer)):
        rows = result[name] = {"alone": bench.runs([], layer, rounds).all_done}
        for count in (1, 16, 64):
            some = bench.transfers(Route.DEVICE_TO_HOST, {G: min(count, bench.blocks[G])})
            rows[f"{count} blocks"] = steady(bench, some, layer, rounds)
            if codec == "exact":
                rows[f"{count} blocks in order"] = steady(bench, some, layer, rounds, in_order=True)
    both = bench.transfers(Route.DEVICE_TO_HOST, {G: bench.blocks[G] // 8})
    both += [Transfer(Route.HOST_TO_DEVICE, G, bench.blocks[G] - 1 - n, move.source) for n, move in enumerate(both)]
    free = {move.source for move in both if move.route is Route.HOST_TO_DEVICE}
    both = [m for m in both if m.route is Route.HOST_TO_DEVICE or m.target not in free]
    moved = sum(bench.pools.host[G][0].nbytes for _ in both)
    result["exchange"] = {"bytes_both_ways": moved, "ms": bench.runs(both, bench.no_layer, rounds).all_done}
    return result


def steady(
    bench: Bench, transfers: Sequence[Transfer], layer: Callable[[], None], rounds: int, *, in_order: bool = False
) -> float:
    """Milliseconds a step, of several one after the other with the same transfers before each."""
    bench.synchronize()
    first = Mark(bench.device)
    for _ in range(2 * rounds):
        if in_order:
            copy_in_order(bench.pools, transfers)
        else:
            bench.pools.apply(transfers)
        for number in range(len(bench.layout.layers)):
            bench.pools.wait(number)
            layer()
    last = Mark(bench.device)
    bench.synchronize()
    return first.until(last) / (2 * rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prefixes", type=int, nargs="*", default=[32768, 131072], help="tokens")
    parser.add_argument("--codecs", nargs="*", choices=("exact", "fp8", "q8", "q4"), default=["exact", "q8"])
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--hidden", type=int, default=5376, help="the width of the layers that are computed")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()

    device = torch.device(options.device)
    layout = layout_of(options.layers, options.block_size)
    blocks = {G: max(options.prefixes) // options.block_size, L: 2 * layout.blocks_for(layout.window)}
    restores: list[Restore] = []
    spills = []
    with torch.inference_mode():
        for codec in options.codecs:
            began = time.perf_counter()
            bench = Bench(layout, blocks, codec, device, hidden=options.hidden)
            print(f"# {codec}: pools ready after {time.perf_counter() - began:.1f} s", flush=True)
            try:
                restores += measure_restores(bench, codec, options.prefixes, options.rounds)
                for result in restores[-len(options.prefixes) :]:
                    print(describe(result), flush=True)
                spills.append(measure_spills(bench, codec, options.rounds))
                print(json.dumps(spills[-1]), flush=True)
            finally:
                bench.close()
            del bench
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {"restores": [asdict(result) for result in restores], "spills": spills}
        options.json.write_text(json.dumps(rows, indent=1))


def describe(result: Restore) -> str:
    steps = "; ".join(
        f"{name} " + ", ".join(f"{what} {value:.2f}" for what, value in numbers.items())
        for name, numbers in result.steps.items()
    )
    return (
        f"{result.codec} {result.tokens} tokens, {result.slot_bytes / 1e9:.2f} GB: alone {result.alone:.1f} ms "
        f"({result.gigabytes_per_second:.1f} GB/s), first layer {result.first_layer:.2f}, issued {result.issued:.2f}; "
        + steps
    )


if __name__ == "__main__":
    main()
