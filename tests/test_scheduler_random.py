"""Any interleaving of what can happen to requests leaves the books balanced and every answer as if nothing had.

What can happen, and what must hold, is in `tests/interleavings.py`; `scripts/torture_scheduler.py` runs it for longer.
"""

from hypothesis import HealthCheck, settings

from tests.interleavings import Interleaving

TestInterleavings = Interleaving.TestCase
TestInterleavings.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
