"""What is to be built and what has been, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.engine_build.estimates import Part, disk_needed, free_bytes
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.tensorrt.records import EngineManifest, EngineRecord
from wicore_backend.executor.tensorrt.store import EngineStore, read_engine

_COLUMNS = ("engine", "MiB", "weights", "activations", "layers", "results in", "takes", "built in")


def plan_table(missing: Sequence[Part], parts: Sequence[Part], *, root: Path, jobs: int, keep_onnx: bool) -> str:
    """What a build will do and take."""
    rows = [("engine", "MiB", "memory, GiB", "seconds", "")]
    for part in parts:
        there = "" if part in missing else "there already"
        rows.append(
            (part.name, _mib(part.engine_bytes), f"{part.memory_bytes / 2**30:.1f}", f"{part.seconds:.0f}", there)
        )
    seconds = sum(part.seconds for part in missing)
    needed = disk_needed(missing, jobs=jobs, keep_onnx=keep_onnx)
    total = sum(part.engine_bytes for part in parts)
    return "\n".join(
        [
            *_aligned(rows),
            f"{len(missing)} of {len(parts)} engines to build, {total / 1e9:.2f} GB in all: about {duration(seconds)} "
            f"of one core, up to {needed / 1e9:.2f} GB of disk ({free_bytes(root) / 1e9:.1f} GB free)",
        ]
    )


def inspection(root: Path) -> str:
    """All engines below `root`: what the library said that they are made of, and whether they are whole.

    Raises
    ------
    ExecutorError
        If there are none.
    """
    tables = [_manifest_table(directory, manifest) for directory, manifest in EngineStore(root).manifests()]
    if not tables:
        raise ExecutorError(
            f"{root} has no engines; build them: python -m scripts.build_engines MODEL --engines {root} ..."
        )
    return "\n\n".join(tables)


def _manifest_table(directory: Path, manifest: EngineManifest) -> str:
    key = manifest.key
    profiles = ", ".join(
        f"{profile.name}: {profile.tokens.min} to {profile.tokens.max} tokens (best {profile.tokens.opt})"
        for profile in key.profiles
    )
    rows = [_COLUMNS, *(_row(directory, record) for record in _in_order(manifest.engines))]
    stored = sum(engine.nbytes for engine in manifest.engines)
    weights = sum(engine.report.weight_bytes for engine in manifest.engines)
    activations = max((max(e.report.activation_bytes, default=0) for e in manifest.engines), default=0)
    return "\n".join(
        [
            f"{directory}",
            f"model {key.model[:16]}, {key.precision}, weights {key.weights}, {key.library} {key.version} for "
            f"{key.compute_capability}" + (f", timed on {key.card}" if key.card else ""),
            f"profiles {profiles}",
            *_aligned(rows),
            f"{len(manifest.engines)} engines, {stored / 1e9:.2f} GB; on the card {weights / 2**30:.2f} GiB of "
            f"weights, {activations / 2**20:,.0f} MiB of activations that they share",
        ]
    )


def _in_order(engines: Iterable[EngineRecord]) -> list[EngineRecord]:
    order = {"first": 0, "mid": 1, "last": 2, "vision": 3}
    return sorted(engines, key=lambda engine: (order.get(engine.file.split(".")[0].split("_")[0], 4), engine.file))


def _row(directory: Path, engine: EngineRecord) -> Sequence[str]:
    report = engine.report
    try:
        read_engine(directory, engine).close()
        state = f"{engine.seconds:.1f} s"
    except ExecutorError as error:
        state = str(error)
    inputs = " ".join(f"{tensor.name}[{','.join(map(_size, tensor.shape))}]" for tensor in report.inputs[:4])
    return (
        engine.file.removesuffix(".engine"),
        _mib(engine.nbytes),
        _mib(report.weight_bytes),
        _mib(max(report.activation_bytes, default=0)),
        _most(report.layers, 3),
        _most(report.precisions, 3),
        inputs,
        state,
    )


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
