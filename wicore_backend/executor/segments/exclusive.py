"""One export to a directory at a time, whoever asks for it: a server, or a command."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)

_LOCK = "exporting.lock"


@contextmanager
def exporting_alone(directory: Path) -> Iterator[None]:
    """Nobody else exports to `directory` meanwhile; who does is waited for.

    The lock ends with the process, however that ends; its file stays.

    Raises
    ------
    OSError
        If the directory cannot be made, or not be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process exports to %s; waiting for it", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
