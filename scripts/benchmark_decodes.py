"""Attention of decodes on Hopper by each kernel, as steps of an engine have it; layers of Gemma-3-27B.

    python -m scripts.benchmark_decodes layer --sequences 1 16 64    what it adds to a layer with all its other kernels
    python -m scripts.benchmark_decodes pool                         a global layer's, in a pool whose blocks hold ten
    python -m scripts.benchmark_decodes layer pool --kv-dtype fp8    both, with keys and values in FP8

A kernel by itself, over layers one after the other, has memory for itself and its pages at hand. In an engine it
follows a product, whose end it may overlap, and a product follows it; and each of its tiles lies on another page of
memory. What is timed are CUDA graphs, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from scripts.benchmark_attention_gpu import (
    BLOCK_SIZE,
    DEVICE,
    HEAD_DIM,
    QUERY_HEADS,
    Bench,
    Load,
    captured,
    decodes_by,
    measure_decode,
    milliseconds,
    read_limit,
)
from scripts.benchmark_shape import QUANTIZE
from scripts.random_gemma3 import published_config, random_weights
from wicore_backend.attention.gpu.hopper_decode import DEEP, DEEP_FP8, SEVERAL, SEVERAL_FP8, Tuning
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup

KERNELS: Mapping[torch.dtype, Mapping[str, Tuning | None]] = {
    torch.bfloat16: {
        "OpenAI Triton": None,
        "several": SEVERAL,
        "several, 3 warps, 6 stages": replace(SEVERAL, warps=3, stages=6, least=3),
        "deep": DEEP,
        "deep, 6 warps": replace(DEEP, warps=6),
    },
    FP8: {
        "OpenAI Triton": None,
        "several": SEVERAL_FP8,
        "several, 4 warps": replace(SEVERAL_FP8, warps=4),
        "deep": DEEP_FP8,
        "deep, 10 tiles at least": replace(DEEP_FP8, least=10),
    },
}
_LAYERS, _KEYS, _TURNS, _REPLAYS = 8, 576, 9, 4
_POOL_VALUES = 5_600_000_000
_POOL_LOADS = (
    *((keys, 1) for keys in (576, 2048, 8192, 32_768, 130_000)),
    *((16_384, 2), (65_000, 2), (8192, 4), (32_000, 4), (576, 8), (8192, 8)),
    *((576, 16), (2048, 16), (8192, 16), (4096, 32), (576, 64), (2048, 64)),
)
"""Keys and sequences, of which ten layers fit the pool."""


class Layers:
    """Layers of the model with random weights of a type of `QUANTIZE`, all local and within the window."""

    def __init__(self, weights: str, most: int, kv_dtype: torch.dtype) -> None:
        self._kv_dtype = kv_dtype
        published = published_config("gemma-3-27b")
        text = replace(published.text, num_layers=_LAYERS, layer_groups=(LayerGroup.LOCAL,) * _LAYERS)
        config = replace(published, text=text, vision=None)
        made = random_weights(config, device=DEVICE, dtype=torch.bfloat16, quantize=QUANTIZE[weights])
        self._hidden_size = text.hidden_size
        self._executor = CudaExecutor(config, made)
        values = (most * -(-_KEYS // BLOCK_SIZE) + 1) * BLOCK_SIZE * self._load(1).token_bytes // kv_dtype.itemsize
        self._memory = random_pool(_LAYERS * values, kv_dtype)

    def decodes(self, sequences: int, *, attends: bool) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A step of the layers as a graph, and what it must be kept with; without attention unless it `attends`."""
        bench = Bench(self._load(sequences), self._memory, layers=_LAYERS)
        bucket = bench.attention.decode_bucket(sequences=sequences, max_keys=_KEYS, measures=False)
        plan = bench.attention.refresh(bucket, bench.step)
        hidden, cos, sin, nothing = (
            torch.randn(sequences, width, device=DEVICE, dtype=torch.bfloat16)
            for width in (self._hidden_size, HEAD_DIM, HEAD_DIM, QUERY_HEADS * HEAD_DIM)
        )

        def work() -> None:
            stream, qkv = hidden, self._executor.first(hidden, cos, sin)
            for layer in range(_LAYERS - 1):
                attended = bench.attention.attend(plan, layer, *qkv) if attends else nothing
                stream, qkv = self._executor.mid(layer, stream, attended, cos, sin)

        return captured(work), (bench, bucket, hidden, cos, sin, nothing)

    def _load(self, sequences: int) -> Load:
        return Load(LayerGroup.LOCAL, _KEYS - 1, sequences, kv_dtype=self._kv_dtype)


def random_pool(values: int, kv_dtype: torch.dtype) -> torch.Tensor:
    pool = torch.empty(values, device=DEVICE, dtype=kv_dtype)
    for part in pool.chunk(8):
        part.copy_(torch.randn(len(part), device=DEVICE, dtype=torch.bfloat16))
    return pool


def in_turns(graphs: Mapping[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Milliseconds of a replay, each one's median."""

    def replays(graph: torch.cuda.CUDAGraph) -> None:
        for _ in range(_REPLAYS):
            graph.replay()

    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_TURNS):
        for name, graph in graphs.items():
            times[name].append(milliseconds(partial(replays, graph), repeats=1) / _REPLAYS)
    return {name: statistics.median(of) for name, of in times.items()}


def layer(weights: str, sequences: list[int], kv_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Microseconds that each kernel adds to a layer."""
    layers = Layers(weights, max(sequences), kv_dtype)
    for count in sequences:
        made = {"without": layers.decodes(count, attends=False)}
        for name, tuning in KERNELS[kv_dtype].items():
            with decodes_by(tuning):
                made[name] = layers.decodes(count, attends=True)
        us = {
            name: ms * 1e3 / (_LAYERS - 1)
            for name, ms in in_turns({n: graph for n, (graph, _) in made.items()}).items()
        }
        without = us.pop("without")
        added = {name: round(of - without, 2) for name, of in us.items()}
        yield {"weights": weights, "sequences": count, "without": round(without, 2), "attention adds, us": added}


def pool(kv_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Microseconds of a global layer in a pool of ten by each kernel."""
    memory = random_pool(_POOL_VALUES, kv_dtype)
    limit = read_limit(memory)
    for keys, sequences in _POOL_LOADS:
        us, load = {}, Load(LayerGroup.GLOBAL, keys - 1, sequences, kv_dtype=kv_dtype)
        for name, tuning in KERNELS[kv_dtype].items():
            with decodes_by(tuning):
                us[name] = measure_decode(load, memory, limit, layers=10)["us"]
        yield {"keys": keys, "sequences": sequences, "read TB/s": round(limit / 1e12, 3), "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("layer", "pool"))
    parser.add_argument("--weights", choices=QUANTIZE, default="fp8", help="of layer")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of layer")
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16", help="of keys and values")
    arguments = parser.parse_args()
    kv_dtype = FP8 if arguments.kv_dtype == "fp8" else torch.bfloat16
    torch.manual_seed(0)
    with torch.inference_mode():
        for what in arguments.what:
            of_layer = what == "layer"
            for row in layer(arguments.weights, arguments.sequences, kv_dtype) if of_layer else pool(kv_dtype):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
