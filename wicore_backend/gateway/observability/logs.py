"""The gateway's log: lines on standard error."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Send what `wicore_backend` logs, from INFO on, to standard error, with time and level."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("wicore_backend")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
