"""How fast the KV codecs are on one CPU core, and how small blocks get.

    python -m scripts.benchmark_codecs --json build/codec-speed.json

Counted are bytes that go in, as they are before encoding, in GB (10^9) per second of the core's own time (not the
clock's: on a busy machine the clock also counts others' work). Encoding and decoding together take the sum of both
times for the same bytes. The best of several rounds, the input larger than the core's caches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import get_args

import torch

from wicore_backend.hmt.codecs import BlockShape, CodecName, make_codec

SHAPES: dict[str, BlockShape] = {
    "demo, global": (2, 2, 16, 2, 64),
    "Gemma-3-27B, global": (10, 2, 16, 16, 128),
}


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The thread's own time for the quickest of several runs."""
    best = float("inf")
    for _ in range(rounds):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--values", type=int, default=2**23, help="of all blocks together, about")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    print("| blocks | dtype | codec | bytes a block | times smaller | encode, GB/s | decode, GB/s | both, GB/s |")
    print("| --- " * 8 + "|")
    for label, shape in SHAPES.items():
        for dtype in options.dtypes:
            blocks = torch.randn(max(1, options.values // prod(shape)), *shape).to(getattr(torch, dtype))
            decoded = torch.empty_like(blocks)
            size = blocks.numel() * blocks.itemsize / 1e9
            for name in get_args(CodecName):
                codec = make_codec(name, shape, blocks.dtype)
                encoded = codec.encode(blocks)
                encoding = seconds(partial(codec.encode, blocks, out=encoded), options.rounds)
                decoding = seconds(partial(codec.decode, encoded, out=decoded), options.rounds)
                rates = [size / encoding, size / decoding, size / (encoding + decoding)]
                rows.append([label, dtype, name, codec.encoded_bytes, codec.ratio, *rates])
                cells = [label, dtype, name, f"{codec.encoded_bytes:,}", f"{codec.ratio:.3f}"]
                print(f"| {' | '.join([*cells, *(f'{rate:.2f}' for rate in rates)])} |", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
