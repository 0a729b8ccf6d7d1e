"""Tries to make the NVMe store lie, and times it. Prints one JSON object.

    python -m scripts.torture_nvme kill          kill -9 at random moments under write load, reopen, read back
    python -m scripts.torture_nvme crash         what a disk may hold after power was lost at any byte, read back
    python -m scripts.torture_nvme damage        random bit flips, truncations, misplaced and torn writes, read back
    python -m scripts.torture_nvme throughput    against a plain direct-I/O copy of the same size, taken in turns
    python -m scripts.torture_nvme opening       the index of a large store, from a cold cache

What a record holds follows from its name, so that every byte can be checked without remembering any. `--directory` is
on the disk in question; what is put there is removed. The exit code is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from scripts.torture_nvme.crash import CrashReport, crash_rounds
from scripts.torture_nvme.damage import DamageReport, damage_rounds
from scripts.torture_nvme.kill import KillReport, kill_rounds
from scripts.torture_nvme.opening import opening
from scripts.torture_nvme.throughput import throughput


class _Run(Protocol):
    def __call__(self, directory: Path, *, rounds: int, seed: int) -> KillReport | CrashReport | DamageReport: ...


@contextmanager
def _place(parent: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="torture-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk in question")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in (("kill", 3_000), ("crash", 5_000), ("damage", 12_500)):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("throughput")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--total-mib", type=int, default=256)
    command.add_argument("--payload-kib", type=int, nargs="+", default=[128, 640, 1280, 6656])
    command.add_argument("--threads", type=int, nargs="+", default=[4])
    command = commands.add_parser("opening")
    command.add_argument("--capacity-gb", type=int, default=100)
    command.add_argument("--slot-kib", type=int, default=128)
    command.add_argument("--slots-a-record", type=int, nargs="+", default=[10, 1])
    options = parser.parse_args(arguments)

    began = time.perf_counter()
    broken = False
    result: Any
    runs: dict[str, _Run] = {"kill": kill_rounds, "crash": crash_rounds, "damage": damage_rounds}
    with _place(options.directory) as place:
        match options.command:
            case "kill" | "crash" | "damage":
                report = runs[options.command](place / "store", rounds=options.rounds, seed=options.seed)
                result, broken = asdict(report), report.broken
            case "throughput":
                result = [
                    throughput(
                        place / f"{size}-{threads}",
                        rounds=options.rounds,
                        total_bytes=options.total_mib << 20,
                        payload_bytes=size << 10,
                        threads=threads,
                    )
                    for size in options.payload_kib
                    for threads in options.threads
                ]
            case _:
                result = [
                    opening(
                        place / str(slots),
                        capacity_bytes=options.capacity_gb * 10**9,
                        slot_bytes=options.slot_kib << 10,
                        slots_a_record=slots,
                    )
                    for slots in options.slots_a_record
                ]
    about = {
        "command": options.command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}",
        "seconds": round(time.perf_counter() - began, 1),
        "broken": broken,
    }
    print(json.dumps(about | {"result": result}, indent=2))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
