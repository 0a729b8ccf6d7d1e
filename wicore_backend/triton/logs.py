"""Python's logging into Triton's log."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils


class TritonLogHandler(logging.Handler):
    """Hands each record to Triton's logger, at the level that comes nearest."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            if record.levelno >= logging.ERROR:
                pb_utils.Logger.log_error(message)
            elif record.levelno >= logging.WARNING:
                pb_utils.Logger.log_warn(message)
            elif record.levelno >= logging.INFO:
                pb_utils.Logger.log_info(message)
            else:
                pb_utils.Logger.log_verbose(message)
        except Exception:
            self.handleError(record)


def log_to_triton() -> None:
    """Send what `wicore_backend` logs, from INFO on, to Triton's log."""
    handler = TritonLogHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("wicore_backend")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
