"""How fast the KV codecs are, and how small blocks get: on one CPU core, or on a GPU.

    python -m scripts.benchmark_codecs --json build/codec-speed.json
    python -m scripts.benchmark_codecs --device cuda --json build/codec-speed-gpu.json

Counted are bytes that go in, as they are before encoding, in GB (10^9) a second.

On the CPU, of the core's own time (not the clock's: on a busy machine the clock also counts others' work). Encoding and
decoding together take the sum of both times for the same bytes. The best of several rounds, the input larger than the
core's caches.

On a GPU, the median of several rounds by the device's own events, the input larger than its caches, against a copy on
the device in the same run: a kernel's traffic is what it reads and what it writes, and so is the copy's. The twins are
the same codecs in PyTorch's operators. Scattered blocks are all of a pool in random order. "Page-locked" are records
in the host's memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from wicore_backend.hmt.codecs import BlockShape, Codec, CodecName, make_codec

SHAPES: dict[str, BlockShape] = {
    "demo, global": (2, 2, 16, 2, 64),
    "Gemma-3-27B, global": (10, 2, 16, 16, 128),
}
DEVICE_SHAPES: dict[str, BlockShape] = {
    "Gemma-3-27B, global": (10, 2, 32, 16, 128),
    "Gemma-3-27B, local": (52, 2, 32, 16, 128),
}
_PINNED_BYTES = 2**28


def thread_seconds(work: Callable[[], object], rounds: int) -> float:
    """The thread's own time for the quickest of several runs."""
    best = float("inf")
    for _ in range(rounds):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def device_seconds(work: Callable[[], object], rounds: int) -> float:
    """The device's time for the median of several runs, after two that do not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]  # type: ignore[no-untyped-call]
    for _ in range(2):
        work()
    for began, ended in zip(events[::2], events[1::2], strict=True):
        began.record()
        work()
        ended.record()
    torch.cuda.synchronize()
    milliseconds = [began.elapsed_time(ended) for began, ended in zip(events[::2], events[1::2], strict=True)]
    return float(statistics.median(milliseconds)) / 1e3


def on_a_core(dtypes: list[str], values: int, rounds: int) -> Iterator[list[object]]:
    """Rows of a table, the first its head."""
    torch.set_num_threads(1)
    rates = [f"{way}, GB/s" for way in ("encode", "decode", "both")]
    yield ["blocks", "dtype", "codec", "bytes a block", "times smaller", *rates]
    for label, shape in SHAPES.items():
        for dtype in dtypes:
            blocks = torch.randn(max(1, values // prod(shape)), *shape).to(getattr(torch, dtype))
            decoded = torch.empty_like(blocks)
            size = blocks.numel() * blocks.itemsize / 1e9
            for name in get_args(CodecName):
                codec = make_codec(name, shape, blocks.dtype)
                encoded = codec.encode(blocks)
                encoding = thread_seconds(partial(codec.encode, blocks, out=encoded), rounds)
                decoding = thread_seconds(partial(codec.decode, encoded, out=decoded), rounds)
                seconds = (encoding, decoding, encoding + decoding)
                yield [label, dtype, name, codec.encoded_bytes, codec.ratio, *(size / each for each in seconds)]


def on_a_gpu(dtypes: list[str], values: int, rounds: int) -> Iterator[list[object]]:
    """Rows of a table, the first its head."""
    yield [
        *("blocks", "dtype", "codec", "way", "GB/s", "% of the copy's traffic"),
        *("twin, GB/s", "times the twin", "page-locked, GB/s"),
    ]
    for label, shape in DEVICE_SHAPES.items():
        for dtype in dtypes:
            blocks = torch.randn(max(1, values // prod(shape)), *shape, device="cuda").to(getattr(torch, dtype))
            size = blocks.numel() * blocks.itemsize
            target = torch.empty_like(blocks)
            traffic = 2 * size / device_seconds(partial(target.copy_, blocks), rounds)
            yield [label, dtype, "a copy on the device", "", size / 1e9 / (2 * size / traffic), 100.0, "", "", ""]
            for name in get_args(CodecName):
                codec = make_codec(name, shape, blocks.dtype)
                yield from _of_codec(codec, [label, dtype, name], blocks, target, traffic, rounds)


def _of_codec(
    codec: Codec, labels: list[str], blocks: Tensor, target: Tensor, traffic: float, rounds: int
) -> Iterator[list[object]]:
    size = blocks.numel() * blocks.itemsize
    records = codec.encode(blocks)
    few = max(1, _PINNED_BYTES // codec.encoded_bytes)
    pinned = torch.empty(min(few, len(blocks)), codec.encoded_bytes, dtype=torch.uint8, pin_memory=True)
    some, some_target = blocks[:few], target[:few]
    ways: dict[str, list[Callable[[], object]]] = {
        "encode": [
            partial(codec.encode, blocks, out=records),
            partial(codec._encode_plain, blocks, records),
            partial(codec.encode, some, out=pinned),
        ],
        "decode": [
            partial(codec.decode, records, out=target),
            partial(codec._decode_plain, records, target),
            partial(codec.decode, pinned, out=some_target),
        ],
    }
    for way, works in ways.items():
        fused, twin, locked = (device_seconds(work, rounds) for work in works)
        share = 100 * (size + records.numel()) / fused / traffic
        rates = [size / 1e9 / fused, share, size / 1e9 / twin, twin / fused]
        yield [*labels, way, *rates, some.numel() * some.itemsize / 1e9 / locked]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--values", type=int, help="of all blocks together, about; 2**23 on the CPU, 2**29 on a GPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()

    measure, values = (on_a_core, 2**23) if options.device == "cpu" else (on_a_gpu, 2**29)
    rows: list[list[object]] = []
    for row in measure(options.dtypes, options.values or values, options.rounds):
        print(f"| {' | '.join(map(_cell, row))} |", flush=True)
        if not rows:
            print("| --- " * len(row) + "|")
        rows.append(row)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
