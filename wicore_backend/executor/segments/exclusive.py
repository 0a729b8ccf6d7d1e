"""One writer of a directory at a time, whoever it is: a server, or a command."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_log = logging.getLogger(__name__)

_EXPORTING = "exporting.lock"

_TRIES = 100
"""To make a file in folders that others remove at the same moment."""


@contextmanager
def alone_in(directory: Path, lock: str, *, wait: bool) -> Iterator[None]:
    """Nobody else who asks for the same `lock` is in `directory` meanwhile.

    The lock ends with the process, however that ends. Afterwards its file is gone, and so are folders that were made
    for it, if nothing is in them and nobody waits.

    Raises
    ------
    BlockingIOError
        If somebody else is there, who is not to be waited for.
    OSError
        If the directory cannot be made, or not be written to.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / lock
    try:
        with _locked(path, wait=wait):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        for folder in made:
            with suppress(OSError):  # Something is in it, or it could not be made.
                folder.rmdir()


@contextmanager
def exporting_alone(directory: Path) -> Iterator[None]:
    """Nobody else exports to `directory` meanwhile; who does is waited for. See `alone_in`."""
    with alone_in(directory, _EXPORTING, wait=True):
        yield


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                _log.info("another process writes to %s; waiting for it", path.parent)
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # Else who had it has removed it, and it keeps nobody out.
                yield
                return


def _opened(path: Path) -> TextIO:
    """The file, made if need be, with its folders, which who leaves may be removing."""
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w")
        except (FileExistsError, FileNotFoundError):
            if not left:
                raise
    raise AssertionError("one of the tries is the last")
