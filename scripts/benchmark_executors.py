"""The demo model on a CPU by PyTorch and by ONNX Runtime, in turns; prints one JSON object.

    python -m scripts.benchmark_executors --threads 1

Each executor is in a process of its own. Figures are medians over `--rounds`, ratios those of each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from scripts.benchmark import DEMO_MODEL, Load, environment
from scripts.benchmark_serving import in_turns, run_in_process
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.config import ExecutorSetting
from wicore_backend.engine.in_process import Images

EXECUTORS: tuple[ExecutorSetting, ...] = ("torch", "onnx")
VOCAB = 2048

LOADS = {
    "batch 1, 128 new tokens": Load(Load.mixed(1, VOCAB).prompts, [128]),
    "16 requests, mixed": Load.mixed(16, VOCAB),
    "a prompt of 2,048 tokens": Load([np.random.default_rng(1).integers(300, VOCAB, 2048).tolist()], [1]),
}


class Side:
    """An engine on one executor, in a process of its own."""

    def __init__(self, executor: ExecutorSetting, threads: int, engines: Path) -> None:
        self._process = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_start, initargs=(executor, threads, engines)
        )
        self.load_seconds = self._process.submit(_load_seconds).result()
        """What loading took: of graphs that had been exported before, where it takes such."""

    def run(self, load: Load) -> None:
        """All of the load at once; nothing of it is in the prefix cache."""
        self._process.submit(_run, load).result()

    def see(self, pictures: int) -> None:
        """As many pictures as that, none of which it has seen."""
        self._process.submit(_see, pictures).result()

    def close(self) -> None:
        self._process.shutdown()


_engine: Engine
_seconds: float
_seen = 0


def _start(executor: ExecutorSetting, threads: int, engines: Path) -> None:
    global _engine, _seconds
    config = EngineConfig(
        model=DEMO_MODEL, device="cpu", executor=executor, engines=engines, threads=threads, prefix_cache=False
    )
    Engine(config).close()
    began = time.perf_counter()
    _engine = Engine(config)
    _seconds = time.perf_counter() - began


def _load_seconds() -> float:
    return _seconds


def _run(load: Load) -> None:
    run_in_process(_engine, load.prompts, load.new_tokens)


def _see(pictures: int) -> None:
    global _seen
    rng = np.random.default_rng(_seen)
    _seen += pictures
    images: Images = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(pictures)]
    _engine.generate("What is this?", SamplingParams(max_tokens=1), images=images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operator")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as engines:
        sides = {executor: Side(executor, args.threads, Path(engines)) for executor in EXECUTORS}
        work: dict[str, dict[str, Callable[[], None]]] = {
            name: {e: partial(side.run, load) for e, side in sides.items()} for name, load in LOADS.items()
        }
        work["8 pictures"] = {e: partial(side.see, 8) for e, side in sides.items()}
        for name, runs in work.items():
            times = in_turns(runs, args.rounds)
            ratios = [torch / onnx for torch, onnx in zip(times["torch"], times["onnx"], strict=True)]
            results[name] = {f"{executor}_s": round(statistics.median(took), 4) for executor, took in times.items()}
            results[name]["torch_over_onnx"] = round(statistics.median(ratios), 2)
        results["loading"] = {f"{executor}_s": round(side.load_seconds, 2) for executor, side in sides.items()}
        for side in sides.values():
            side.close()
    print(json.dumps({"benchmark": "executors", "environment": environment(), "result": results}, indent=2))


if __name__ == "__main__":
    main()
