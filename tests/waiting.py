"""How tests wait for what goes on beside them."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, within_s: float = 5, every_s: float = 0.002) -> None:
    """Look every so often, until `condition` holds; it has to within `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"waited {within_s:g} s in vain"
        time.sleep(every_s)
