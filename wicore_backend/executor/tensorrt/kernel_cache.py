"""Kernels that TensorRT-RTX compiled on this card, kept on disk for the next start."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class KernelCache:
    """The library's `IRuntimeCache` for all contexts, in a file.

    It is worth seconds, never an error: what cannot be read, is of another card or driver, or cannot be written, is
    compiled again.

    Parameters
    ----------
    path
        None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Have the contexts of an `IRuntimeConfig` use it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what has been compiled until now, if that is more than before."""
        if self._cache is None or self._path is None:
            return
        content = bytes(self._cache.serialize())
        if content == self._saved:
            return
        # Servers of the same engines may write at the same time.
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            _log.warning("%s cannot be written: %s; kernels are compiled again at the next start", self._path, error)
            return
        self._saved = content

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            content = self._path.read_bytes()
        except OSError as error:
            _log.warning("%s cannot be read: %s; kernels are compiled again", self._path, error)
            return
        if self._cache.deserialize(content):
            self._saved = content
        else:
            _log.info("%s is of another card, driver or library; kernels are compiled again", self._path)
