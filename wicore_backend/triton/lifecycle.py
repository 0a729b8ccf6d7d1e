"""The thread that looks after a served engine: its health goes out, and the wish for its end comes in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from wicore_backend.engine.health import Health
from wicore_backend.triton.readiness import Readiness
from wicore_backend.triton.supervision import Supervision

_log = logging.getLogger(__name__)


class Lifecycle:
    """Tells the supervisor and Triton how the engine is, and drains it before the supervisor stops the server.

    Parameters
    ----------
    health
        The engine's.
    drain
        Refuses new requests, gives running ones so many seconds, and returns when all have ended and been answered.
    """

    def __init__(
        self,
        supervision: Supervision,
        readiness: Readiness,
        *,
        health: Callable[[], Health],
        drain: Callable[[float], None],
        interval_s: float = 0.1,
    ) -> None:
        self._supervision = supervision
        self._readiness = readiness
        self._health = health
        self._drain = drain
        self._interval_s = interval_s
        self._draining: threading.Thread | None = None
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wicore-lifecycle", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread: the engine is no longer there, nor are its troubles."""
        self._stop.set()
        self._thread.join()
        self._try(lambda: self._readiness.follow(Health(True)))
        self._supervision.leave()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._try(self._look)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
            self._failing = False
        except Exception:
            if not self._failing:  # Once, not ten times a second.
                _log.exception("the engine's health could not be told; trying on")
            self._failing = True

    def _look(self) -> None:
        health = self._health()
        if self._draining is None:
            self._supervision.tell(health)
            grace_s = self._supervision.drain_grace_s()
            if grace_s is not None:
                _log.info("draining: running requests have %g s to end", grace_s)
                self._draining = threading.Thread(
                    target=self._drain_and_leave, args=(grace_s,), name="wicore-drain", daemon=True
                )
                self._draining.start()
        self._readiness.follow(health)

    def _drain_and_leave(self, grace_s: float) -> None:
        try:
            self._drain(grace_s)
            _log.info("drained")
        except Exception:
            _log.exception("the engine could not be drained")
        self._supervision.leave()
