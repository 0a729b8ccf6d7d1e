"""Engines on disk: found for a card and a model, or it is said what is missing or differs."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_128

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision, Segment
from wicore_backend.executor.tensorrt.library import LibraryName
from wicore_backend.executor.tensorrt.records import CONTRACT_VERSION, EngineKey, EngineManifest, EngineRecord

MANIFEST = "engines.json"
_EXACTNESS = (Precision.FP32, Precision.BF16, Precision.FP16, Precision.FP8, Precision.INT4)
_MAX_MANIFEST_BYTES = 1 << 24
_CHUNK = 1 << 24

_log = logging.getLogger(__name__)


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
    activations
        The type to compute in; None takes any.
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
    activations: torch.dtype | None = None

    def objections(self, key: EngineKey) -> Sequence[str]:
        """Why engines of `key` will not do, in words."""
        told = []
        if key.model != self.model:
            told.append(f"of another checkpoint ({key.model[:12]} instead of {self.model[:12]})")
        if self.precision is not None and key.precision != self.precision:
            told.append(f"in {key.precision} instead of {self.precision}")
        if self.activations not in (None, key.precision.activations):
            found, wanted = (str(dtype)[len("torch.") :] for dtype in (key.precision.activations, self.activations))
            told.append(f"computing in {found}, and dtype = {wanted!r} ('auto' takes any)")
        if key.library != self.library:
            told.append(f"for {key.library} instead of {self.library}")
        elif key.version != self.version:
            told.append(f"of {key.library} {key.version} instead of {self.version}")
        if key.compute_capability != self.compute_capability:
            told.append(f"for {key.compute_capability}, and this card, {self.card}, is {self.compute_capability}")
        elif key.card not in (None, self.card):
            told.append(f"timed on {key.card}, and this card is {self.card}")
        if key.contract != CONTRACT_VERSION:
            told.append(f"of contract {key.contract} instead of {CONTRACT_VERSION}")
        if key.max_batch_tokens < self.max_batch_tokens:
            told.append(f"for steps of {key.max_batch_tokens} tokens, and max_batch_tokens = {self.max_batch_tokens}")
        return told

    @property
    def command(self) -> str:
        """What builds them."""
        usual = Precision.FP16 if self.compute_capability == "sm75" else Precision.BF16
        plain = {each.activations: each for each in (Precision.FP32, Precision.FP16, Precision.BF16)}
        precision = self.precision or (plain[self.activations] if self.activations else usual)
        return (
            f"python -m scripts.build_engines MODEL --target {self.compute_capability} --precision {precision} "
            f"--library {'rtx' if self.library is LibraryName.TENSORRT_RTX else 'tensorrt'} "
            f"--max-running {self.max_running} --max-batch-tokens {self.max_batch_tokens}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class EngineSet:
    """All engines of a model, there and fitting."""

    directory: Path
    key: EngineKey
    engines: Mapping[Segment, EngineRecord]

    @property
    def records(self) -> Sequence[EngineRecord]:
        """Each engine once."""
        return tuple({record.file: record for record in self.engines.values()}.values())

    def read(self, record: EngineRecord) -> mmap.mmap:
        """The file of one of its engines, checked to the last byte.

        Raises
        ------
        ExecutorError
            If it is missing, cut short or damaged.
        """
        return read_engine(self.directory, record)


def read_engine(directory: Path, record: EngineRecord) -> mmap.mmap:
    """An engine's file in `directory`: see `EngineSet.read`."""
    path = directory / record.file
    remedy = f"delete it and run the build command again, which builds what is missing in {directory}"
    if path.is_symlink():
        raise ExecutorError(f"{path} is a link, which may lead anywhere; {remedy}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.nbytes or size == 0:
                raise ExecutorError(f"{path} has {size:,} bytes instead of {record.nbytes:,}; {remedy}")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ExecutorError(f"{path} cannot be read: {error}; {remedy}") from error
    digest = xxh3_128()
    with memoryview(content) as view:
        for start in range(0, size, _CHUNK):
            digest.update(view[start : start + _CHUNK])
    if digest.hexdigest() != record.digest:
        content.close()
        raise ExecutorError(f"{path} is damaged: its checksum is not that of {MANIFEST}; {remedy}")
    return content


class EngineFolder:
    """The engines of one key while they are built, one after the other, over as many runs as it takes.

    What `engines.json` says is there is whole: a file is finished before it is named there. A folder whose manifest
    cannot be read, or is of an older contract, starts anew; its files are replaced one by one.
    """

    def __init__(self, directory: Path, manifest: EngineManifest) -> None:
        self.directory = directory
        self._manifest = manifest

    @classmethod
    def open(cls, root: Path, key: EngineKey, *, replace: bool = False) -> EngineFolder:
        """Of the engines of `key` below `root`.

        Parameters
        ----------
        replace
            Give up engines of another model or other settings that are there.

        Raises
        ------
        ExecutorError
            If it cannot be made, or such engines are there and are not to be replaced.
        """
        directory = root / key.folder
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExecutorError(f"{directory} cannot be made: {error}; give another directory") from error
        manifest = EngineManifest(key=key)
        if (directory / MANIFEST).exists():
            try:
                there = read_manifest(directory)
            except ExecutorError as error:
                _log.warning("%s", error)
            else:
                differences = "; ".join(there.key.differences(key))
                if not differences:
                    manifest = there
                elif replace or there.key.contract != key.contract:
                    _log.warning("%s: built anew: %s", directory, differences)
                else:
                    raise ExecutorError(
                        f"{directory} has {len(there.engines)} engines of another kind ({differences}); name another "
                        "directory with --engines, or give them up with --replace"
                    )
        return cls(directory, manifest)

    @property
    def key(self) -> EngineKey:
        return self._manifest.key

    @property
    def records(self) -> Sequence[EngineRecord]:
        """Of all engines that are there."""
        return self._manifest.engines

    def path(self, segment: Segment) -> Path:
        """Where to build the engine of a segment, or of several of which it is the first."""
        return self.directory / f"{segment.name}.engine"

    def missing(self, segments: Iterable[Segment]) -> Sequence[Segment]:
        """Those of `segments` that have no engine of the right size yet."""
        there = {name for record in self.records if self._whole(record) for name in record.segments}
        return [segment for segment in segments if segment.name not in there]

    def add(self, record: EngineRecord) -> None:
        """Take an engine in; what crashes later finds it there.

        Raises
        ------
        ExecutorError
            If the manifest cannot be written.
        """
        others = [other for other in self.records if not set(other.segments) & set(record.segments)]
        engines = tuple(sorted((*others, record), key=lambda each: each.file))
        self._manifest = EngineManifest(key=self.key, engines=engines)
        path = self.directory / MANIFEST
        unfinished = path.with_suffix(".json.tmp")
        try:
            with unfinished.open("w") as file:
                file.write(self._manifest.model_dump_json(indent=1))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            raise ExecutorError(f"{path} cannot be written: {error}; free space there") from error

    def _whole(self, record: EngineRecord) -> bool:
        with suppress(OSError):
            return (self.directory / record.file).stat().st_size == record.nbytes
        return False


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
        told = []
        for directory in self.folders():
            try:
                manifest = read_manifest(directory)
            except ExecutorError as error:
                told.append(str(error))
                continue
            objections = wanted.objections(manifest.key)
            if not objections:
                by_name = {name: record for record in manifest.engines for name in record.segments}
                lacking = [segment.name for segment in wanted.segments if segment.name not in by_name]
                if not lacking:
                    engines = {segment: by_name[segment.name] for segment in wanted.segments}
                    return EngineSet(directory, manifest.key, engines)
                objections = [f"not finished: {len(lacking)} of {len(wanted.segments)} are missing, {lacking[0]} first"]
            told.append(f"those in {directory} are {', '.join(objections)}")
        found = "; ".join(told) if told else f"{self._root} has none at all"
        raise ExecutorError(
            f"no TensorRT engines for this model, card and library: {found}; build them: {wanted.command}"
        )

    def folders(self) -> Sequence[Path]:
        """Those that have a manifest, the most exact precision first."""
        order = {str(precision): place for place, precision in enumerate(_EXACTNESS)}
        folders = [path.parent for path in self._root.glob(f"*/*/{MANIFEST}") if path.parent.parent.name in order]
        return sorted(folders, key=lambda folder: (order[folder.parent.name], folder.name))


def read_manifest(directory: Path) -> EngineManifest:
    """What is in the `engines.json` of a directory.

    Raises
    ------
    ExecutorError
        If it cannot be read or is none.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ExecutorError(f"{path} is far too large for a list of engines; delete it and build them again")
        return EngineManifest.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ExecutorError(f"{path} cannot be read: {error}; build the engines again") from error
