"""What the log says of a start: from the process to the first request that it takes, part by part."""

import re
import subprocess
import sys
import time

from wicore_backend.triton.startup import Startup


def test_the_age_of_a_process_counts_from_before_python():
    code = "import time; time.sleep(0.3); from wicore_backend.triton import startup; print(startup.process_age_s())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - began + 0.02


def test_the_parts_add_up_to_the_whole():
    startup = Startup()
    time.sleep(0.12)
    startup.done("engine")
    startup.done("serving")
    said = re.fullmatch(
        r"ready (\S+) s after its process was started \(Python and packages (\S+) s, engine (\S+) s, serving 0\.0 s\)",
        str(startup),
    )
    assert said is not None
    whole, before, engine = map(float, said.groups())
    assert engine >= 0.1
    assert abs(whole - before - engine) < 0.2
