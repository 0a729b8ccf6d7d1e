"""Runs the tests that need a GPU and prints what came of them as one JSON object.

    python -m scripts.gpu_figures.tests --processes 8

Beside processes that share tests out among them, one of many threads takes those that compute on the CPU for long.
Tests that count on the card's free memory run by themselves, after the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.gpu_figures.running import ROOT

_ON_A_CARD = re.compile(r"mark\.gpu\b|\bkernel_device\b")
_OF_MANY_THREADS = ("test_gpu_answers.py", "test_kv_dtype.py", "test_pictures.py", "test_structured_output.py")
_FIRST = "test_codec_kernels.py"
"""It has the tests that take longest."""
_ALONE = (
    ("tests/test_gpu.py", "test_the_cache_takes_its_share_of_the_free_memory"),
    ("tests/test_device_memory.py", "test_a_model_computes_within_what_was_set_aside"),
)
_ANSWERS = re.compile(r"(float32|bfloat16): (\d+) of (\d+) answers are the same")


def files() -> list[str]:
    """The files with tests that a card runs."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if _ON_A_CARD.search(path.read_text())]
    found.sort(key=lambda path: path.name != _FIRST)
    return [str(path.relative_to(ROOT)) for path in found]


def outcome(junit: Path) -> dict[str, Any]:
    """What a report of pytest's says: counts, who failed and why, and how many answers are those of a CPU."""
    cases = list(ET.parse(junit).iter("testcase"))
    failed: dict[str, str] = {}
    answers: dict[str, float] = {}
    for case in cases:
        for kind in ("failure", "error"):
            if (trouble := case.find(kind)) is not None:
                failed[f"{case.get('classname')}::{case.get('name')}"] = (trouble.get("message") or "")[:300]
        for told in case.iter("system-out"):
            for dtype, same, asked in _ANSWERS.findall(told.text or ""):
                answers[dtype] = int(same) / int(asked)
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failed)
    return {"passed": passed, "skipped": skipped, "failed": failed, "same_answers": answers}


def run(arguments: Sequence[str], *, threads: int) -> dict[str, Any]:
    """Run pytest; one that ends without a report has failed as a whole."""
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        command += ["-o", "junit_logging=system-out", "-o", "junit_log_passing_tests=true", "--durations", "10"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, stdout=sys.stderr, check=False
        ).returncode
        if not junit.exists():
            return {"passed": 0, "skipped": 0, "failed": {"pytest": f"exit code {code}"}, "same_answers": {}}
        return outcome(junit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="only find the tests")
    given = parser.parse_args()
    if given.collect:
        result = run(["--collect-only", *files()], threads=1)
        print(json.dumps(result | {"files": files()}))
        return
    cpus = os.cpu_count() or 1
    spread = ["-n", str(given.processes)] if given.processes > 1 else []
    few = [name for name in files() if Path(name).name in _OF_MANY_THREADS]
    alone = " or ".join(name for _, name in _ALONE)
    # What they print is wanted of tests that pass, too.
    with ThreadPoolExecutor(1) as beside:
        answers = beside.submit(run, ["-rP", "-m", "gpu", "--timeout", "150", *few], threads=max(1, cpus // 2))
        others = ["-k", f"not ({alone})", "--timeout", "120", *(name for name in files() if name not in few)]
        parts = [run([*spread, *others], threads=max(1, cpus // 8)), answers.result()]
    parts.append(run(["-k", alone, *(file for file, _ in _ALONE)], threads=cpus))
    result = {what: sum(part[what] for part in parts) for what in ("passed", "skipped")}
    for what in ("failed", "same_answers"):
        result[what] = {name: value for part in parts for name, value in part[what].items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
