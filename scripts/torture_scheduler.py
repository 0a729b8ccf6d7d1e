"""Tries to make the scheduler break a promise: many random interleavings over the real engine and a fake model.

    nice python -m scripts.torture_scheduler --interleavings 10000 --seed 1

What may happen and what must hold is in tests/interleavings.py. Prints what happened as a table; a broken
promise ends the run with the shortest interleaving found that breaks it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.hash_model import TALLY
from tests.interleavings import Interleaving


def torture(interleavings: int, operations: int, number: int) -> Counter[str]:
    """Run so many interleavings, drawn from seed `number`; what happened."""
    torch.set_num_threads(1)
    TALLY.clear()
    run_state_machine_as_test(
        seed(number)(Interleaving),
        settings=settings(
            max_examples=interleavings,
            stateful_step_count=operations,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return TALLY


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interleavings", type=int, default=10_000)
    parser.add_argument("--operations", type=int, default=30, help="in one interleaving, at most")
    parser.add_argument("--seed", type=int, default=1, help="of the first process; the next one takes the next number")
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args(arguments)

    began = time.perf_counter()
    tally: Counter[str] = Counter()
    share = -(-options.interleavings // options.processes)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        seeds = range(options.seed, options.seed + options.processes)
        for part in pool.map(partial(torture, share, options.operations), seeds):
            tally += part
    minutes = (time.perf_counter() - began) / 60
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"{minutes:.1f} minutes; no promise was broken.\n\n| what happened | how often |\n|---|---|"
    )
    for what, count in sorted(tally.items()):
        print(f"| {what} | {count:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
