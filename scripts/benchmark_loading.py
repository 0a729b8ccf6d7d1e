"""How fast a checkpoint is loaded from a disk, beside that disk's own speed in the same run.

    python -m scripts.benchmark_loading --model models/gemma-3-27b
    python -m scripts.benchmark_loading --shape gemma-3-27b --directory /var/tmp     # random weights, written first

In each round the page cache lets go of the files; the disk's *own* speed is that of direct reads of the same files, in
pieces as large and by as many threads as loading has, before and after. Then all is in the page cache, and is loaded
once more: *warm*. On `--device meta` tensors have no memory, and what is left is reading.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scripts.random_gemma3 import SHAPES
from scripts.write_random_gemma3 import write_checkpoint
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.tensor_files import weight_files
from wicore_backend.models.gemma3.upload import READING_THREADS

_PIECE = 8 << 20


def let_go(files: Sequence[Path]) -> None:
    """Have the page cache forget the files, which nobody else may have mapped."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def own_speed(files: Sequence[Path], most: int) -> float:
    """Bytes a second of direct reads of the files' first `most` bytes, taken evenly from each."""
    share = min(1.0, most / sum(path.stat().st_size for path in files))
    jobs = [(path, at) for path in files for at in range(0, max(_PIECE, int(share * path.stat().st_size)), _PIECE)]
    handles = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}

    def read(first: int) -> int:
        room = mmap.mmap(-1, _PIECE)
        return sum(os.preadv(handles[path], [room], at) for path, at in jobs[first::READING_THREADS])

    try:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            began = time.perf_counter()
            count = sum(pool.map(read, range(READING_THREADS)))
            return count / (time.perf_counter() - began)
    finally:
        for handle in handles.values():
            os.close(handle)


def loading_s(model: Path, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds until the weights of `model` are on `device`."""
    config = Gemma3Config.from_checkpoint(model)
    began = time.perf_counter()
    weights = load_weights(model, config, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    del weights
    return took


@contextmanager
def checkpoint(args: argparse.Namespace, device: torch.device) -> Iterator[Path]:
    """The model, written first if it is to be a random one."""
    if args.model is not None:
        yield args.model
        return
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-loading-") as directory:
        maker = torch.device("cpu") if device.type == "meta" else device
        began = time.perf_counter()
        size = write_checkpoint(args.shape, Path(directory), device=maker, quantized=args.int4)
        tell({"written_gb": size / 1e9, "in_s": round(time.perf_counter() - began, 1)})
        yield Path(directory)


def tell(told: dict[str, Any]) -> None:
    print(json.dumps(told), file=sys.stderr, flush=True)  # So that a run that is cut short was not for nothing.


def run(model: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Speeds of each round, in GB/s."""
    files = weight_files(model)
    size = sum(path.stat().st_size for path in files)
    # What PyTorch does once, is not loading's: start CUDA, or import what a tensor without memory needs.
    1.0 + torch.zeros(1, device=device).copy_(torch.ones(1).to(device)).float()
    rounds = []
    for _ in range(args.rounds):
        let_go(files)
        before = own_speed(files, args.own_bytes)
        let_go(files)
        cold_s = loading_s(model, device, torch.bfloat16)
        let_go(files)
        own = (before + own_speed(files, args.own_bytes)) / 2
        rounds.append(
            {"own_gb_s": own / 1e9, "cold_s": cold_s, "cold_gb_s": size / cold_s / 1e9, "share": size / cold_s / own}
        )
        tell(rounds[-1])
    result: dict[str, Any] = {"gb": size / 1e9, "files": len(files), "device": str(device), "threads": READING_THREADS}
    result |= {what: round(statistics.median(one[what] for one in rounds), 3) for what in rounds[0]}
    result["rounds"] = rounds
    if args.warm:
        for path in files:
            _bring(path)
        result["warm_gb_s"] = round(size / loading_s(model, device, torch.bfloat16) / 1e9, 3)
    return result


def _bring(path: Path) -> None:
    """Into the page cache."""
    room = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a checkpoint's directory")
    what.add_argument("--shape", choices=SHAPES, help="of a checkpoint with random weights")
    parser.add_argument("--int4", action="store_true", help="its layers' matrices in four bits")
    parser.add_argument("--directory", type=Path, help="where that is written, and removed again")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "meta"], default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-bytes", type=int, default=8 << 30, help="to read for the disk's own speed, at most")
    parser.add_argument("--warm", action="store_true", help="from the page cache as well")
    args = parser.parse_args(arguments)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(name)
    with checkpoint(args, device) as model:
        print(json.dumps({"benchmark": "loading", "result": run(model, args, device)}))


if __name__ == "__main__":
    main()
