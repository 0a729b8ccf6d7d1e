"""Threads that decode what has been read.

A disk gives records faster than a core decodes them, so several batches are decoded at once. Exact blocks, and those
that host memory holds encoded, need none of it: no thread is started for them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from wicore_backend.hmt.cold_tier.staging import Stage, staging_for
from wicore_backend.hmt.cold_tier.threads import compute_alone

_log = logging.getLogger(__name__)


class Decoders:
    """A few threads, each with memory of its own for blocks of scattered slots.

    Parameters
    ----------
    threads
        At most; they are started as they are needed.
    """

    def __init__(self, stages: Iterable[Stage], *, threads: int) -> None:
        self._stages = tuple(stages)
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cold-decode", initializer=self._begin)

    def submit(self, work: Callable[[Tensor], None], then: Callable[[], None]) -> None:
        """Have `work` called with a thread's staging memory, and then `then`, also if it raised: a bug, which is
        logged."""
        self._threads.submit(self._do, work, then)

    def close(self) -> None:
        """End the threads once they have done what was submitted; to be called when that is over."""
        self._threads.shutdown()

    def _begin(self) -> None:
        compute_alone()
        self._own.staging = staging_for(self._stages)

    @torch.inference_mode()  # Slots and trays may have been made under it, and are not to be written otherwise.
    def _do(self, work: Callable[[Tensor], None], then: Callable[[], None]) -> None:
        try:
            work(self._own.staging)
        except Exception:
            _log.exception("cold_tier_bug")
        then()
