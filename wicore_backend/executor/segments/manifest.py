"""What an export wrote: one graph for each segment, and `segments.json`, which says what each takes and gives.

The file is written last, so a directory that has one has all of a model. It may come from elsewhere: what it says is
checked against the files beside it before anybody opens them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, SegmentSpec, TensorSpec

WeightsAs = Literal["embedded", "inputs"]
"""Whether a graph has its weights within, or takes them as inputs, which many graphs and executors can share."""

MANIFEST = "segments.json"
FORMAT_VERSION = 2
"""Of the file and of the graphs: raised when those of an older version no longer do."""

_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_TYPES["int64"] = torch.int64
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_REMEDY = "export the segments again (scripts/export_segments.py)"


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """One segment's graph.

    Attributes
    ----------
    path
        The graph, `.onnx`. Large tensors lie in a file of the same name that ends in `.bin`, if there are any.
    weights
        The graph's inputs after those of `spec`, in order; empty when weights are embedded.
    nbytes
        Of the graph and its large tensors.
    """

    spec: SegmentSpec
    path: Path
    weights: tuple[TensorSpec, ...]
    nbytes: int

    @property
    def data(self) -> Path:
        """Where the graph's large tensors lie, if it has any."""
        return self.path.with_suffix(".bin")

    def stored_bytes(self) -> int:
        """Of the graph and its large tensors as they lie on the disk now, 0 for what is missing."""
        return sum(path.stat().st_size for path in (self.path, self.data) if path.is_file())


@dataclass(frozen=True, slots=True)
class SegmentSet:
    """All segments of one model in one precision.

    Attributes
    ----------
    fingerprint
        Of the checkpoint, in hexadecimal digits.
    searched
        Matrices that were rounded to INT4 have the best of many scales; False in every other precision.
    files
        By segment, in the order in which a step runs them. With weights as inputs all `mid` are one file.
    """

    directory: Path
    precision: Precision
    fingerprint: str
    weights: WeightsAs
    searched: bool
    files: Mapping[Segment, SegmentFile]

    @classmethod
    def read(cls, directory: Path, *, name: str = MANIFEST, whole: bool = True) -> Self:
        """The set that was exported to `directory`.

        Parameters
        ----------
        whole
            Refuse files that are missing or cut short, rather than leave them out.

        Raises
        ------
        SegmentError
            If there is none, if it is of another version or damaged, or if a file that it names is missing, cut short
            or outside of the directory.
        """
        path = directory / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise SegmentError(f"{directory} has no {name}: it holds no complete export; {_REMEDY}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise SegmentError(f"{path} cannot be read: {error}; {_REMEDY}") from None
        fields = _Fields(path, content, "")
        if (version := fields.integer("version")) != FORMAT_VERSION:
            raise SegmentError(f"{path} has version {version} in place of {FORMAT_VERSION}; {_REMEDY}")
        precision = Precision(fields.choice("precision", tuple(Precision)))
        files = [_segment_file(directory, entry) for entry in fields.entries("segments")]
        if whole:
            for file in files:
                _check_stored(file)
        else:
            files = [file for file in files if file.stored_bytes() == file.nbytes]
        by_segment = {file.spec.segment: file for file in files}
        if len(by_segment) != len(files):
            raise SegmentError(f"{path} names a segment twice; {_REMEDY}")
        weights: WeightsAs = "inputs" if fields.choice("weights", get_args(WeightsAs)) == "inputs" else "embedded"
        return cls(directory, precision, fields.text("fingerprint"), weights, fields.truth("searched"), by_segment)

    def write(self, *, name: str = MANIFEST) -> None:
        """Write the set's file; who reads it meanwhile sees the old one or the new one."""
        content = {
            "version": FORMAT_VERSION,
            "precision": self.precision,
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "searched": self.searched,
            "segments": [_as_json(file) for file in self.files.values()],
        }
        unfinished = self.directory / f"{name}.tmp"
        with unfinished.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.directory / name)


def _as_json(file: SegmentFile) -> dict[str, Any]:
    def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "type": _NAMES[spec.dtype], "shape": spec.shape} for spec in specs]

    return {
        "kind": file.spec.segment.kind,
        "layer": file.spec.segment.layer,
        "file": file.path.name,
        "bytes": file.nbytes,
        "inputs": tensors(file.spec.inputs),
        "outputs": tensors(file.spec.outputs),
        "weights": tensors(file.weights),
    }


def _segment_file(directory: Path, entry: _Fields) -> SegmentFile:
    kind = SegmentKind(entry.choice("kind", tuple(SegmentKind)))
    segment = Segment(kind, entry.integer("layer"))
    name = entry.text("file")
    if Path(name).name != name or not name.endswith(".onnx"):
        raise entry.error("file", "the name of an .onnx file beside it")
    file = SegmentFile(
        SegmentSpec(segment, _specs(entry, "inputs"), _specs(entry, "outputs")),
        directory / name,
        _specs(entry, "weights"),
        entry.integer("bytes"),
    )
    if file.path.is_symlink() or file.data.is_symlink():
        raise entry.error("file", "a file beside it, and no link to one elsewhere")
    return file


def _check_stored(file: SegmentFile) -> None:
    if not file.path.is_file():
        raise SegmentError(f"{file.path.parent} lacks {file.path.name}, which its manifest names; {_REMEDY}")
    if (stored := file.stored_bytes()) != file.nbytes:
        raise SegmentError(f"{file.path} and its data have {stored:,} bytes in place of {file.nbytes:,}; {_REMEDY}")


def _specs(entry: _Fields, key: str) -> tuple[TensorSpec, ...]:
    tensors = entry.entries(key)
    return tuple(TensorSpec(t.text("name"), _TYPES[t.choice("type", tuple(_TYPES))], t.shape("shape")) for t in tensors)


class _Fields:
    """One object of the file, with errors that name the key, the value seen and what is allowed."""

    def __init__(self, path: Path, values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            raise SegmentError(f"{path} holds a {type(values).__name__} at {prefix or 'its top'}; {_REMEDY}")
        self._path = path
        self._values = values
        self._prefix = prefix

    def error(self, key: str, allowed: str) -> SegmentError:
        seen = repr(self._values[key])[:80] if key in self._values else "missing"
        return SegmentError(f"{self._path}: {self._prefix}{key} is {seen} in place of {allowed}; {_REMEDY}")

    def integer(self, key: str) -> int:
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(key, "a whole number")
        return value

    def truth(self, key: str) -> bool:
        value = self._values.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a text")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        if self._values.get(key) not in allowed:
            raise self.error(key, " or ".join(allowed))
        return self.text(key)

    def shape(self, key: str) -> tuple[int | str, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(_is_size(size) for size in value):
            raise self.error(key, "a list of sizes and their letters")
        return tuple(value)

    def entries(self, key: str) -> tuple[_Fields, ...]:
        value = self._values.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return tuple(_Fields(self._path, item, f"{self._prefix}{key}[{i}].") for i, item in enumerate(value))


def _is_size(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
