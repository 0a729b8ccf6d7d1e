"""What is to be built and what has been, for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.engine_build.estimates import Part, disk_needed, free_bytes
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import SegmentKind
from wicore_backend.executor.tensorrt.records import EngineManifest, EngineRecord
from wicore_backend.executor.tensorrt.store import EngineStore, read_engine, read_manifest
from wicore_backend.sizes import disk_size, gib

_COLUMNS = ("engine", "MiB", "weights", "activations", "layers", "results in", "takes", "built in")
_NUMBER = re.compile(r"[\d,.]+( s)?")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What engines there are.

    Attributes
    ----------
    tables
        One for each model, precision, library and kind of card.
    problems
        What is wrong with files, in sentences.
    """

    tables: Sequence[str]
    problems: Sequence[str]

    def __str__(self) -> str:
        return "\n\n".join([*self.tables, *self.problems])


def plan_table(missing: Sequence[Part], parts: Sequence[Part], *, root: Path, jobs: int, keep_onnx: bool) -> str:
    """What a build will do and take."""
    rows = [("engine", "MiB", "memory, GiB", "seconds", "")]
    for part in parts:
        there = "" if part in missing else "there already"
        rows.append((part.name, _mib(part.engine_bytes), gib(part.memory_bytes), f"{part.seconds:.0f}", there))
    seconds = sum(part.seconds for part in missing)
    needed = disk_needed(missing, jobs=jobs, keep_onnx=keep_onnx)
    total = sum(part.engine_bytes for part in parts)
    return "\n".join(
        [
            *_aligned(rows),
            f"{len(missing)} of {len(parts)} engines to build, {disk_size(total)} in all: about {duration(seconds)} "
            f"of one core, up to {disk_size(needed)} of disk ({disk_size(free_bytes(root))} free)",
        ]
    )


def inspection(root: Path) -> Inspection:
    """All engines below `root`: what the library said that they are made of, and whether they are whole.

    Raises
    ------
    ExecutorError
        If there are none.
    """
    tables: list[str] = []
    problems: list[str] = []
    folders = EngineStore(root).folders()
    for directory in folders:
        try:
            manifest = read_manifest(directory)
        except ExecutorError as error:
            problems.append(str(error))
        else:
            damaged = _damaged(directory, manifest)
            tables.append(_manifest_table(directory, manifest, damaged))
            problems += map(str, damaged.values())
    if not folders:
        raise ExecutorError(
            f"{root} has no engines; build them: python -m scripts.build_engines MODEL --engines {root} ..."
        )
    return Inspection(tables, problems)


def _damaged(directory: Path, manifest: EngineManifest) -> Mapping[str, ExecutorError]:
    """Of files that are not as they were built, what is wrong with them."""
    damaged = {}
    for engine in manifest.engines:
        try:
            read_engine(directory, engine).close()
        except ExecutorError as error:
            damaged[engine.file] = error
    return damaged


def _manifest_table(directory: Path, manifest: EngineManifest, damaged: Collection[str]) -> str:
    key = manifest.key
    profiles = ", ".join(
        f"{profile.name}: {profile.tokens.min} to {profile.tokens.max} tokens (best {profile.tokens.opt})"
        for profile in key.profiles
    )
    rows = [_COLUMNS, *(_row(engine, whole=engine.file not in damaged) for engine in _in_order(manifest.engines))]
    stored = sum(engine.nbytes for engine in manifest.engines)
    weights = sum(engine.report.weight_bytes for engine in manifest.engines)
    decoder, tower = (
        max((_activations(e) for e in manifest.engines if (SegmentKind.VISION in e.segments) == seeing), default=0)
        for seeing in (False, True)
    )
    return "\n".join(
        [
            f"{directory}",
            f"model {key.model[:16]}, {key.precision}, weights {key.weights}, {key.library} {key.version} for "
            f"{key.compute_capability}" + (f", timed on {key.card}" if key.card else ""),
            f"profiles {profiles}",
            *_aligned(rows),
            f"{len(manifest.engines)} engines, {disk_size(stored)}; on the card {weights / 2**30:.2f} GiB of "
            f"weights and {_mib(decoder)} MiB of activations, which the decoder's engines share"
            + (f"; {_mib(tower)} MiB more are the vision tower's" if tower else ""),
        ]
    )


def _in_order(engines: Iterable[EngineRecord]) -> list[EngineRecord]:
    order = {"first": 0, "mid": 1, "last": 2, "vision": 3}
    return sorted(engines, key=lambda engine: (order.get(engine.file.split(".")[0].split("_")[0], 4), engine.file))


def _row(engine: EngineRecord, *, whole: bool) -> Sequence[str]:
    report = engine.report
    inputs = " ".join(f"{tensor.name}[{','.join(map(_size, tensor.shape))}]" for tensor in report.inputs[:4])
    return (
        engine.file.removesuffix(".engine"),
        _mib(engine.nbytes),
        _mib(report.weight_bytes),
        _mib(_activations(engine)),
        _most(report.layers, 3),
        _most(report.precisions, 3),
        inputs,
        f"{engine.seconds:.1f} s" if whole else "DAMAGED",
    )


def _activations(engine: EngineRecord) -> int:
    return max(engine.report.activation_bytes, default=0)


def _most(counts: object, shown: int) -> str:
    return " ".join(f"{name}:{count}" for name, count in Counter(counts).most_common(shown))  # type: ignore[call-overload]


def _size(size: int) -> str:
    return "*" if size < 0 else str(size)


def duration(seconds: float) -> str:
    """ "2 h 05 min", "12 min", "40 s"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with a head: columns of numbers end below each other, others begin so."""
    lines = []
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numbers = [any(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    for row in rows:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return lines
