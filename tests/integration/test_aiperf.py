"""NVIDIA's aiperf, unmodified, in front of a real server and gateway.

What it needs does not fit beside the packages of the server, so it has an environment of its own, in which AIPERF names
the program (`.ci/run` makes one); without it there is nothing to try.
"""

import os
import shutil
import subprocess
import sys

import pytest

from scripts.serving.installation import ROOT

AIPERF = os.environ.get("AIPERF") or shutil.which("aiperf")


@pytest.mark.skipif(AIPERF is None, reason="aiperf is not installed; AIPERF names the program")
def test_no_request_of_aiperf_fails_and_its_counts_are_the_servers():
    command = [sys.executable, "-m", "scripts.benchmark_aiperf", "--aiperf", str(AIPERF), "--at-a-time", "1", "8"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    rows = [line for line in ran.stdout.splitlines() if line.startswith(("| 1 ", "| 8 "))]
    assert len(rows) == 2, ran.stdout
