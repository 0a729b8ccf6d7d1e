"""A process knows how long it has been there, its interpreter's start included."""

import subprocess
import sys
import time

ASK = """
import sys, time
time.sleep(0.3)
from wicore_backend.observability.process_age import process_age_s
print(process_age_s())
"""


def test_the_age_is_that_since_the_start_of_the_process():
    began = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout)
    assert 0.28 <= told <= time.monotonic() - began + 0.05
