"""Speed of paged attention on a GPU, for the layers of Gemma-3-27B: 32 query and 16 KV heads of 128, blocks of 32.

    python -m scripts.benchmark_attention_gpu decode      a layer's decode: us, and keys' and values' bytes a second
    python -m scripts.benchmark_attention_gpu mass        what attention mass costs a decode
    python -m scripts.benchmark_attention_gpu prefill     a layer's prefill of a chunk after a prefix: TFLOP/s
    python -m scripts.benchmark_attention_gpu yardsticks  PyTorch's attention over contiguous keys and values
    python -m scripts.benchmark_attention_gpu decode-variants prefill-variants
                                                          the shapes of tiles that attention/gpu/tuning.py chooses from,
                                                          for kernels in OpenAI Triton
    ... --kv-dtype fp8                                    with keys and values in e4m3

Decodes by the kernel for Hopper, and as steps of an engine have them, are in `scripts/benchmark_decodes.py`. What is
timed are replays of a CUDA graph, as decode steps are served, over layers whose keys and values do not fit the card's
cache together. The read limit and PyTorch's attention on contiguous tensors are from the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu import hopper_decode
from wicore_backend.attention.gpu.decode_bucket import DecodeBucket
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.attention.gpu.tuning import Launch, PrefillLaunch, Tuning
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

QUERY_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW = 32, 16, 128, 32, 1024
SCALE = 168**-0.5
DEVICE = torch.device("cuda")
_TOKEN_VALUES = 2 * KV_HEADS * HEAD_DIM
_MOST_BYTES = 20 * 2**30
_COLD_BYTES = 2**29


@dataclass(frozen=True)
class Load:
    """Decodes of `batch` sequences, or a prefill of `new` tokens, after `past` tokens."""

    group: LayerGroup
    past: int
    batch: int = 1
    new: int = 1
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def keys(self) -> int:
        """That the last token sees."""
        keys = self.past + self.new
        return min(keys, WINDOW) if self.group is LayerGroup.LOCAL else keys

    @property
    def bytes_read(self) -> int:
        """Keys and values that one layer's decode has to read."""
        return self.batch * self.keys * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """A token's keys and values in one layer."""
        return _TOKEN_VALUES * self.kv_dtype.itemsize

    @property
    def operations(self) -> float:
        """Floating-point operations of one layer's prefill: two products over the visible pairs."""
        positions = np.arange(self.past, self.past + self.new, dtype=np.float64)
        seen = positions + 1
        if self.group is LayerGroup.LOCAL:
            seen = np.minimum(seen, WINDOW)
        return float(4 * HEAD_DIM * QUERY_HEADS * seen.sum())


class Bench:
    """Layers of one group over a pool of random keys and values, and a step for them."""

    def __init__(self, load: Load, memory: Tensor, tuning: Tuning | None = None, *, layers: int | None = None) -> None:
        self.load = load
        span = min(load.keys + load.new + BLOCK_SIZE, load.past + load.new)
        held = -(-span // BLOCK_SIZE) + 1
        total = -(-(load.past + load.new) // BLOCK_SIZE)
        held = min(held, total)
        blocks = load.batch * held + 1
        layer_bytes = blocks * BLOCK_SIZE * load.token_bytes
        cold = _COLD_BYTES // layer_bytes + 1 if layers is None else layers
        self.layers = int(max(1, min(10, cold, memory.nbytes // layer_bytes)))
        layout = KVLayout.of(
            [load.group] * self.layers,
            block_size=BLOCK_SIZE,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            window=WINDOW,
            bytes_per_value=load.kv_dtype.itemsize,
        )
        shape = (blocks, *layout.block_shape(load.group))
        pool = memory[: int(np.prod(shape))].view(shape)
        self.attention = GpuPagedAttention(
            KVPools(layout, {load.group: pool}),
            query_heads=QUERY_HEADS,
            scale=SCALE,
            window=WINDOW,
            softcap=None,
            dtype=torch.bfloat16,
            tuning=tuning,
        )
        table = np.zeros((load.batch, total), np.int32)
        table[:, total - held :] = 1 + np.random.default_rng(0).permutation(load.batch * held).reshape(load.batch, held)
        positions = np.tile(np.arange(load.past, load.past + load.new, dtype=np.int32), load.batch)
        self.step = PackedStep(
            positions=positions,
            attend_limits=positions,
            query_lens=np.full(load.batch, load.new, np.int32),
            decodes=load.batch if load.new == 1 else 0,
            block_tables={load.group: table},
        )
        qkv = torch.randn(len(positions), QUERY_HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        self.keep: list[DecodeBucket] = []
        self.qkv = torch.split(qkv, [QUERY_HEADS, KV_HEADS, KV_HEADS], 1)

    def decode_graph(self, *, measures: bool = False, measured: bool = False) -> torch.cuda.CUDAGraph:
        """All layers' decodes, captured; of the first layer's, attention mass is asked if `measured`."""
        bucket = self.attention.decode_bucket(
            sequences=self.load.batch, max_keys=self.load.past + 1, measures=measures or measured
        )
        asked = {0: range(self.load.batch)} if measured else {}
        plan = self.attention.refresh(bucket, replace(self.step, measured=asked))
        self.keep.append(bucket)  # A graph does not own the memory that it reads.
        return captured(lambda: [self.attention.attend(plan, layer, *self.qkv) for layer in range(self.layers)])

    def prefill(self) -> Callable[[], None]:
        """All layers' prefills."""
        plan = self.attention.plan(self.step)

        def run() -> None:
            for layer in range(self.layers):
                self.attention.attend(plan, layer, *self.qkv)

        return run


@contextmanager
def decodes_by(tuning: hopper_decode.Tuning | None) -> Iterator[None]:
    """Attentions that are made meanwhile have the kernel for Hopper cut so, or if it is None do without it."""
    tuned = {} if tuning is None else dict.fromkeys(hopper_decode.TUNED, hopper_decode.Tunings(*[tuning] * 3))
    with mock.patch.object(hopper_decode, "TUNED", tuned):
        yield


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `work`, which has run before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def milliseconds(work: Callable[[], Any], *, repeats: int) -> float:
    """Median time on the device."""
    work()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def read_limit(memory: Tensor) -> float:
    """Bytes a second that a plain sum reads."""
    values = memory[: 2**32 // memory.itemsize].view(torch.int64)
    return values.nbytes / milliseconds(lambda: values.max(), repeats=10) * 1e3


def decode_loads(kv_dtype: torch.dtype, most_bytes: float) -> Iterator[Load]:
    for group in (LayerGroup.GLOBAL, LayerGroup.LOCAL):
        for context in (576, 8192, 32768, 130_000):
            if group is LayerGroup.LOCAL and context > 8192:
                continue
            for batch in (1, 16, 64, 128):
                load = Load(group, context - 1, batch, kv_dtype=kv_dtype)
                if load.bytes_read < most_bytes:
                    yield load


def measure_decode(
    load: Load, memory: Tensor, limit: float, tuning: Tuning | None = None, *, layers: int | None = None
) -> dict[str, Any]:
    bench = Bench(load, memory, tuning, layers=layers)
    graph = bench.decode_graph()
    repeats = 30 if load.bytes_read < 2**31 else 8
    us = milliseconds(graph.replay, repeats=repeats) * 1e3 / bench.layers
    return {
        "group": str(load.group),
        "context": load.past + 1,
        "batch": load.batch,
        "us": round(us, 2),
        "TB/s": round(load.bytes_read / us / 1e6, 3),
        "of the limit": round(load.bytes_read / us * 1e6 / limit, 3),
    }


def measure_mass(load: Load, memory: Tensor) -> dict[str, Any]:
    """A layer's decode in a bucket that cannot measure, in one that can, and in one asked for all of its sequences."""
    bench = Bench(load, memory)
    bench.layers = 1
    graphs = [
        bench.decode_graph(measures=measures, measured=asked)
        for measures, asked in ((False, False), (True, False), (True, True))
    ]
    us = [milliseconds(graph.replay, repeats=30) * 1e3 for graph in graphs]
    names = ("cannot measure", "can", "is asked")
    return {"context": load.past + 1, "batch": load.batch} | dict(zip(names, (round(t, 2) for t in us), strict=True))


def measure_prefill(load: Load, memory: Tensor, tuning: Tuning | None = None) -> dict[str, Any]:
    bench = Bench(load, memory, tuning)
    ms = milliseconds(captured(bench.prefill()).replay, repeats=5) / bench.layers
    return {
        "group": str(load.group),
        "prefix": load.past,
        "chunk": load.new,
        "batch": load.batch,
        "ms": round(ms, 3),
        "TFLOP/s": round(load.operations * load.batch / ms / 1e9, 1),
    }


def yardsticks(memory: Tensor) -> Iterator[dict[str, Any]]:
    """PyTorch's attention over contiguous keys and values."""
    for past in (0, 32768):
        q = torch.randn(1, QUERY_HEADS, 8192, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        k, v = (
            memory[i * (past + 8192) * KV_HEADS * HEAD_DIM :][: (past + 8192) * KV_HEADS * HEAD_DIM]
            .view(1, KV_HEADS, past + 8192, HEAD_DIM)
            .repeat_interleave(QUERY_HEADS // KV_HEADS, 1)
            for i in range(2)
        )
        causal = past == 0
        for backend in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            with torch.nn.attention.sdpa_kernel(backend):
                attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, scale=SCALE)
                ms = milliseconds(attend, repeats=5)
            pairs = 8192 * 8193 / 2 if causal else 8192 * (past + 8192)
            tflops = 4 * HEAD_DIM * QUERY_HEADS * pairs / ms / 1e9
            yield {"torch": backend.name, "prefix": past, "chunk": 8192, "causal": causal, "TFLOP/s": round(tflops, 1)}


def decode_variants(kv_dtype: torch.dtype) -> Iterator[Launch]:
    if kv_dtype == FP8:
        for keys, warps, stages, fill in (
            *((32, 1, 4, 8), (32, 1, 4, 10), (32, 1, 5, 7), (32, 1, 5, 8), (32, 1, 5, 10), (64, 2, 4, 4)),
            *((64, 2, 4, 5), (64, 2, 5, 5), (64, 1, 4, 7), (64, 1, 5, 6)),
        ):
            yield Launch(keys, warps, stages, fill)
        return
    for keys, warps, stages, fill in (
        *((32, 2, 3, 4), (32, 2, 4, 4), (32, 2, 5, 3), (32, 2, 5, 4), (32, 1, 3, 6), (32, 1, 4, 4), (32, 1, 5, 3)),
        *((32, 1, 5, 4), (32, 1, 6, 3), (32, 1, 6, 4), (32, 1, 7, 2), (16, 1, 8, 4), (16, 1, 12, 4), (64, 2, 3, 4)),
    ):
        yield Launch(keys, warps, stages, fill)


def prefill_variants() -> Iterator[PrefillLaunch]:
    for rows, keys, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 5)):
        yield PrefillLaunch(keys, warps, stages, 1, rows=rows)
    yield PrefillLaunch(128, 8, 2, 1, rows=128, hopper_stages=2)
    yield PrefillLaunch(64, 8, 5, 1, rows=128, hopper_stages=3)
    yield PrefillLaunch(64, 8, 5, 1, rows=128, hopper_stages=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        nargs="+",
        choices=("decode", "mass", "prefill", "decode-variants", "prefill-variants", "yardsticks", "compile"),
    )
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16", help="of keys and values")
    parser.add_argument("--json", type=Path, help="where to write the results, too")
    parser.add_argument("--nth", default="0/1", help="of compile: which of how many shares of the variants")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    torch.manual_seed(0)
    small = "compile" in arguments.what
    memory = torch.empty(2**28 if small else _MOST_BYTES // 2, device=DEVICE, dtype=torch.bfloat16).normal_()
    kv_dtype = FP8 if arguments.kv_dtype == "fp8" else torch.bfloat16
    memory = memory.to(kv_dtype)
    of_kind = partial(Load, kv_dtype=kv_dtype)
    chosen = Tuning.of(HEAD_DIM, torch.bfloat16, kv_dtype)
    if small:
        nth, of = map(int, arguments.nth.split("/"))
        decodes = [replace(chosen, decode=launch) for launch in decode_variants(kv_dtype)]
        prefills = [replace(chosen, prefill=launch, local_prefill=None) for launch in prefill_variants()]
        with decodes_by(None):
            for tuning in decodes[nth::of]:
                Bench(of_kind(LayerGroup.GLOBAL, 575), memory, tuning).decode_graph()
        for tuning in prefills[nth::of]:
            for load in (of_kind(LayerGroup.GLOBAL, 0, 1, 8192), of_kind(LayerGroup.GLOBAL, 4096, 1, 64)):
                Bench(load, memory, tuning).prefill()()
        torch.cuda.synchronize()
        return
    limit = read_limit(memory)
    report(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "KV": arguments.kv_dtype,
            "read TB/s": round(limit / 1e12, 3),
        }
    )
    if "decode-variants" in arguments.what:
        of_keys = ((575, (1, 16, 32, 64, 128)), (8191, (1, 16)), (32767, (16,)), (129_999, (1,)))
        loads = [of_kind(LayerGroup.GLOBAL, past, batch) for past, batches in of_keys for batch in batches]
        loads += [of_kind(LayerGroup.LOCAL, 8191, batch) for batch in (1, 16, 64)]
        report({"loads": [f"{load.group} {load.past + 1} x {load.batch}" for load in loads]})
        with decodes_by(None):
            for launch in decode_variants(kv_dtype):
                us = [measure_decode(load, memory, limit, replace(chosen, decode=launch))["us"] for load in loads]
                report({"decode": str(launch), "us": us})
    if "prefill-variants" in arguments.what:
        chunks = [of_kind(LayerGroup.GLOBAL, 0, 1, 8192), of_kind(LayerGroup.GLOBAL, 32768, 1, 8192)]
        chunks.append(of_kind(LayerGroup.LOCAL, 8192, 1, 8192))
        for launch in prefill_variants():
            tflops = [
                measure_prefill(load, memory, replace(chosen, prefill=launch, local_prefill=None))["TFLOP/s"]
                for load in chunks
            ]
            report({"prefill": str(launch), "TFLOP/s": tflops})
    if "yardsticks" in arguments.what:
        for row in yardsticks(memory):
            report(row)
    if "decode" in arguments.what:
        for load in decode_loads(kv_dtype, 0.95 * memory.nbytes):
            report(measure_decode(load, memory, limit))
    if "mass" in arguments.what:
        for context, batch in ((576, 64), (8192, 16), (130_000, 1)):
            report(measure_mass(of_kind(LayerGroup.GLOBAL, context - 1, batch), memory))
    if "prefill" in arguments.what:
        for past in (0, 32768, 122_880):
            report(measure_prefill(of_kind(LayerGroup.GLOBAL, past, 1, 8192), memory))
        report(measure_prefill(of_kind(LayerGroup.LOCAL, 8192, 1, 8192), memory))
        report(measure_prefill(of_kind(LayerGroup.GLOBAL, 0, 1, 512), memory))
        report(measure_prefill(of_kind(LayerGroup.LOCAL, 0, 1, 512), memory))
        report(measure_prefill(of_kind(LayerGroup.GLOBAL, 131_072, 1, 32), memory))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
