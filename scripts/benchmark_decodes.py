"""Attention of decodes on Hopper by each kernel, as steps of an engine have it; layers of Gemma-3-27B.

    python -m scripts.benchmark_decodes layer --sequences 1 16 64    what it adds to a layer with all its other kernels
    python -m scripts.benchmark_decodes pool                         a global layer's, in a pool whose blocks hold ten
    python -m scripts.benchmark_decodes layer pool --kv-dtype fp8    both, with keys and values in FP8
    python -m scripts.benchmark_decodes inside    a local layer of one token with attention in its kernel, and beside it

A kernel by itself, over layers one after the other, has memory for itself and its pages at hand. In an engine it
follows a product, whose end it may overlap, and a product follows it; and each of its tiles lies on another page of
memory. What is timed are CUDA graphs, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any, Literal, NamedTuple

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
from wicore_backend.attention.base import Unattended
from wicore_backend.attention.gpu.hopper_decode import DEEP, DEEP_FP8, SEVERAL, SEVERAL_FP8, Tuning
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.executor.streamed_layer import MEASURED, Form, StreamedLayers
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
_KV_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp8": FP8}
_LAYERS, _KEYS, _TURNS, _REPLAYS = 8, 576, 9, 4
_INSIDE_KEYS = (64, 576, 1536)
"""Of `inside`: few, as after a prompt of 512 tokens, and a full window."""
_LEAST = (2, 3, 6, 9)
"""Tiles of a block at least, besides what `Tuning` has."""
_REPEATS = 100
_POOL_VALUES = 5_600_000_000
_POOL_LOADS = (
    *((keys, 1) for keys in (576, 2048, 8192, 32_768, 130_000)),
    *((16_384, 2), (65_000, 2), (8192, 4), (32_000, 4), (576, 8), (8192, 8)),
    *((576, 16), (2048, 16), (8192, 16), (4096, 32), (576, 64), (2048, 64)),
)
"""Keys and sequences, of which ten layers fit the pool."""


Way = Literal["inside", "apart", "without"]
"""Attention in the layers' kernels, as kernels of its own, or none."""


class Decodes(NamedTuple):
    """Layers of a step as a graph.

    Attributes
    ----------
    results
        The residual stream, and the next layer's queries, keys and values.
    kept
        What the graph uses.
    """

    graph: torch.cuda.CUDAGraph
    results: Sequence[torch.Tensor]
    kept: Any


class Layers:
    """Layers of the model with random weights of a type of `QUANTIZE`, all local and within the window."""

    def __init__(self, weights: str, most: int, kv_dtype: torch.dtype, *, keys: int = _KEYS) -> None:
        self._kv_dtype = kv_dtype
        published = published_config("gemma-3-27b")
        text = replace(published.text, num_layers=_LAYERS, layer_groups=(LayerGroup.LOCAL,) * _LAYERS)
        config = replace(published, text=text, vision=None)
        made = random_weights(config, device=DEVICE, dtype=torch.bfloat16, quantize=QUANTIZE[weights])
        self._text, self._layers = text, made.text.layers
        self._executor = CudaExecutor(config, made)
        self._streamed = {MEASURED.least: self._executor._streamed}
        values = (most * -(-keys // BLOCK_SIZE) + 2) * BLOCK_SIZE * self._load(1, 1).token_bytes // kv_dtype.itemsize
        self._memory = random_pool(_LAYERS * values, kv_dtype)
        sizes = text.hidden_size, HEAD_DIM, HEAD_DIM, QUERY_HEADS * HEAD_DIM
        self._rows = [torch.randn(most, size, device=DEVICE, dtype=torch.bfloat16) for size in sizes]

    def decodes(self, sequences: int, way: Way, *, keys: int = _KEYS, least: int = MEASURED.least) -> Decodes:
        """A step of the layers; with attention inside of each, a block has at least so many tiles."""
        bench = Bench(self._load(sequences, keys), self._memory, layers=_LAYERS)
        bucket = bench.attention.decode_bucket(sequences=sequences, max_keys=keys, measures=False)
        plan = bench.attention.refresh(bucket, bench.step)
        hidden, cos, sin, nothing = (row[:sequences] for row in self._rows)
        results: list[torch.Tensor] = []
        streamed = self._executor._streamed = self._streamed_with(least)

        def attended(layer: int, qkv: Sequence[torch.Tensor]) -> torch.Tensor | Unattended:
            if way == "inside":
                left = bench.attention.left(plan, layer, *qkv)
                if left is None or not self._executor.attends(left):
                    raise RuntimeError("the layers' kernel does not take their attention")
                return left
            return bench.attention.attend(plan, layer, *qkv) if way == "apart" else nothing

        def work() -> None:
            stream, qkv = hidden, self._executor.first(hidden, cos, sin)
            for layer in range(_LAYERS - 1):
                stream, qkv = self._executor.mid(layer, stream, attended(layer, qkv), cos, sin)
            results[:] = stream, *qkv

        return Decodes(captured(work), results, (bench, bucket, streamed))

    def _streamed_with(self, least: int) -> StreamedLayers | None:
        if least not in self._streamed:
            form = Form.of(self._text, self._layers, replace(MEASURED, least=least))
            assert form is not None
            self._streamed[least] = StreamedLayers(form, self._text.rms_norm_eps, self._layers, torch.device(DEVICE))
        return self._streamed[least]

    def _load(self, sequences: int, keys: int) -> Load:
        return Load(LayerGroup.LOCAL, keys - 1, sequences, kv_dtype=self._kv_dtype)


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


def of_layer(made: Mapping[str, Decodes]) -> dict[str, float]:
    """Microseconds, of a layer."""
    found = in_turns({name: decodes.graph for name, decodes in made.items()})
    return {name: ms * 1e3 / (_LAYERS - 1) for name, ms in found.items()}


def inside(weights: str, kv_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Microseconds of a layer of one token with attention in its kernel, as a kernel of its own, and without; and by
    how much the last layer's result inside differs from what it is apart."""
    layers = Layers(weights, 1, kv_dtype, keys=max(_INSIDE_KEYS))
    for keys in _INSIDE_KEYS:
        made = {way: layers.decodes(1, way, keys=keys) for way in ("without", "apart", "inside")}
        made |= {f"inside, {least} tiles": layers.decodes(1, "inside", keys=keys, least=least) for least in _LEAST}
        made["apart"].graph.replay()
        right = [result.clone() for result in made["apart"].results]
        wrong = {name: _wrong(one, right) for name, one in made.items() if name.startswith("inside")}
        us = {name: round(of, 2) for name, of in of_layer(made).items()}
        yield {"weights": weights, "kv": str(kv_dtype), "keys": keys, "us a layer": us, "differs by": wrong}


def _wrong(decodes: Decodes, right: Sequence[torch.Tensor]) -> float:
    """The greatest relative difference of a result.

    Raises
    ------
    RuntimeError
        If replays differ from each other.
    """
    decodes.graph.replay()
    first = [result.clone() for result in decodes.results]
    for turn in range(_REPEATS):
        decodes.graph.replay()
        if not all(map(torch.equal, decodes.results, first)):
            raise RuntimeError(f"other numbers in replay {turn}")
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(first, right, strict=True))


def layer(weights: str, sequences: list[int], kv_dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Microseconds that each kernel adds to a layer."""
    layers = Layers(weights, max(sequences), kv_dtype)
    for count in sequences:
        made = {"without": layers.decodes(count, "without")}
        for name, tuning in KERNELS[kv_dtype].items():
            with decodes_by(tuning):
                made[name] = layers.decodes(count, "apart")
        us = of_layer(made)
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
    parser.add_argument("what", nargs="+", choices=("layer", "pool", "inside"))
    parser.add_argument("--weights", choices=QUANTIZE, nargs="+", default=["fp8"], help="of layer and inside")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of layer")
    parser.add_argument("--kv-dtype", choices=_KV_DTYPES, nargs="+", default=["bf16"], help="of keys and values")
    arguments = parser.parse_args()
    rows: Mapping[str, Callable[[torch.dtype], Iterator[dict[str, Any]]]] = {
        "layer": lambda kv_dtype: chain.from_iterable(
            layer(weights, arguments.sequences, kv_dtype) for weights in arguments.weights
        ),
        "pool": pool,
        "inside": lambda kv_dtype: chain.from_iterable(inside(weights, kv_dtype) for weights in arguments.weights),
    }
    torch.manual_seed(0)
    with torch.inference_mode():
        for what, kv_dtype in product(arguments.what, arguments.kv_dtype):
            for row in rows[what](_KV_DTYPES[kv_dtype]):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
