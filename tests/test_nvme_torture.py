"""Samples of `scripts/torture_nvme`, which does for hours what these do for seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MEMORY = Path("/dev/shm")
"""Where each round closes a store, and a disk would take its time for that."""


def torture(directory: Path, command: str, rounds: int) -> dict[str, Any]:
    """In a process of its own: it forks."""
    program = [sys.executable, "-m", "scripts.torture_nvme", "--directory", str(directory), command]
    done = subprocess.run([*program, "--rounds", str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result


def test_a_killed_writer_leaves_every_acknowledged_record_and_no_wrong_byte(tmp_path):
    result = torture(tmp_path, "kill", 20)
    assert result["rounds"] == 20
    assert result["acknowledged"] > 50
    assert result["read_back"] > 100
    assert result["wrong"] == result["unopened"] == result["lost"] == result["corrupt"] == 0


def test_power_lost_at_any_byte_leaves_right_records_or_none(tmp_path):
    result = torture(MEMORY if MEMORY.is_dir() else tmp_path, "crash", 200)
    assert result["rounds"] == 200
    assert result["served"] > 1000
    assert result["found"] > result["served"], "some crash has to leave a header without its payload"
    assert result["wrong"] == result["unopened"] == 0


def test_damaged_files_are_misses_of_the_damaged_records_alone(tmp_path):
    result = torture(MEMORY if MEMORY.is_dir() else tmp_path, "damage", 300)
    assert sum(result["rounds"].values()) == 300
    assert result["refused"] > 100
    assert result["wrong"] == result["unopened"] == result["collateral"] == 0
