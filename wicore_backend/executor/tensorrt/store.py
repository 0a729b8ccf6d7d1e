"""Engines on disk: found for a card and a model, or it is said what is missing or differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from wicore_backend.executor.segments.contract import Precision, Segment
from wicore_backend.executor.tensorrt.library import LibraryName
from wicore_backend.executor.tensorrt.records import EngineKey, EngineRecord

MANIFEST = "engines.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Engines to look for.

    Attributes
    ----------
    model
        The checkpoint's fingerprint, in hexadecimal.
    precision
        None takes what is there, the most exact first.
    card
        The card's name.
    max_running, max_batch_tokens
        The engine's settings.
    segments
        All that the model has.
    """

    model: str
    precision: Precision | None
    library: LibraryName
    version: str
    compute_capability: str
    card: str
    max_running: int
    max_batch_tokens: int
    segments: Sequence[Segment]


@dataclass(frozen=True, slots=True, eq=False)
class EngineSet:
    """All engines of a model, there and fitting."""

    directory: Path
    key: EngineKey
    engines: Mapping[Segment, EngineRecord]


class EngineFolder:
    """The engines of one key while they are built, one after the other, over as many runs as it takes."""

    @classmethod
    def open(cls, root: Path, key: EngineKey) -> Self:
        """Engines of `key` that have been built below `root`; those of another key that are in their place are dropped."""
        raise NotImplementedError

    def path(self, file: str) -> Path:
        """Where to build the engine with the file name `file`."""
        raise NotImplementedError

    def missing(self, segments: Iterable[Segment]) -> Sequence[Segment]:
        """Those of `segments` that have no whole engine yet."""
        raise NotImplementedError

    def add(self, record: EngineRecord) -> None:
        """Take an engine in; what crashes later finds it there."""
        raise NotImplementedError

    def records(self) -> Sequence[EngineRecord]:
        """Of all engines that are there."""
        raise NotImplementedError


class EngineStore:
    """The directory of all engines: `<precision>/<library>-<version>-<smXX>/engines.json` and files beside it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find(self, wanted: Wanted) -> EngineSet:
        """The engines that are wanted.

        Raises
        ------
        ExecutorError
            If there are none: names what is there, what of it differs, and the command that builds them.
        """
        raise NotImplementedError
