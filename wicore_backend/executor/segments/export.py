"""Exports a model's dense segments as ONNX graphs, one segment's weights in memory at a time.

An export that is cut short goes on where it was: `exporting.json` names the segments that are complete, and becomes
`segments.json` with the last of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from torch import Tensor

from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import (
    Precision,
    Segment,
    SegmentKind,
    SegmentSpec,
    TensorSpec,
    segment_spec,
    segments,
)
from wicore_backend.executor.segments.decoder_graphs import DecoderGraphs
from wicore_backend.executor.segments.graph import DataFile, Graph
from wicore_backend.executor.segments.keeping import KeptParts, check_fits, kept_bytes
from wicore_backend.executor.segments.manifest import MANIFEST, SegmentFile, SegmentSet, WeightsAs
from wicore_backend.executor.segments.source import MemoryParts, Parts, ShapeParts, WeightSource
from wicore_backend.executor.segments.vision_graph import VisionGraph
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import Gemma3Weights, Weight
from wicore_backend.sizes import disk_size

_UNFINISHED = "exporting.json"
_SHARED_MID = "mid"
"""Of the files of the one graph that all `mid` are if weights are inputs."""
_OURS = re.compile(r"(first|mid(_\d+)?|last|vision)\.(onnx|bin)(\.tmp)?")
_SPARE = 1.02
"""Room on the disk, for a byte of weights: what lies between them, and graphs."""


def export_segments(
    model: Path | WeightSource,
    directory: Path,
    precision: Precision,
    *,
    weights: WeightsAs = "embedded",
    search: bool = True,
    progress: Callable[[int, int], object] = lambda _, __: None,
) -> SegmentSet:
    """Write all segments of the checkpoint in `model` to `directory`, those left out that are there already.

    Parameters
    ----------
    model
        A checkpoint's directory, or one that is open, which stays open.
    search
        For a matrix that is rounded to INT4 here, try many scales: ten times the time, a twentieth less error.
    progress
        Called with the bytes of weights written so far and those that there are, after each segment.

    Raises
    ------
    CheckpointError
        If `model` holds no checkpoint, or a broken one.
    SegmentError
        If the model cannot be in this precision, or the disk has no room.
    """
    with WeightSource.open(model) if isinstance(model, Path) else nullcontext(model) as source:
        _check(source, precision, weights)
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            return _export_missing(source, directory, precision, weights=weights, search=search, progress=progress)


def _export_missing(
    source: WeightSource,
    directory: Path,
    precision: Precision,
    *,
    weights: WeightsAs,
    search: bool,
    progress: Callable[[int, int], object],
) -> SegmentSet:
    config = source.config
    wanted = {segment: kept_bytes(config, segment, precision, weights) for segment in segments(config)}
    searched = search and precision is Precision.INT4
    exported = _with_complete(SegmentSet(directory, precision, source.fingerprint, weights, searched, {}), config)
    files = dict(exported.files)
    if files.keys() != wanted.keys() or not (directory / MANIFEST).exists():
        (directory / MANIFEST).unlink(missing_ok=True)
        _remove_others(directory, exported)
        _check_room(directory, sum(size for segment, size in wanted.items() if segment not in files))
    for segment in wanted:
        if segment not in files:
            shared = next((f for s, f in files.items() if s.kind is segment.kind), None)  # Only `mid` come in numbers.
            if weights == "inputs" and shared is not None:
                files[segment] = replace(shared, spec=segment_spec(config, segment, precision))
            else:
                files[segment] = export_segment(source, segment, precision, directory, weights=weights, search=search)
            replace(exported, files=files).write(name=_UNFINISHED)
        progress(sum(wanted[segment] for segment in wanted if segment in files), sum(wanted.values()))
    exported = replace(exported, files={segment: files[segment] for segment in wanted})
    exported.write()
    (directory / _UNFINISHED).unlink(missing_ok=True)
    return exported


def export_segment(
    source: WeightSource,
    segment: Segment,
    precision: Precision,
    directory: Path,
    *,
    weights: WeightsAs = "embedded",
    search: bool = True,
) -> SegmentFile:
    """Write one segment to `directory`; its files appear when they are complete.

    With weights as inputs all `mid` are one file, which has no values and takes no time.

    Raises
    ------
    CheckpointError
        If the checkpoint is broken.
    SegmentError
        If the model cannot be in this precision, or the file cannot be written.
    """
    _check(source, precision, weights)
    shared = weights == "inputs"
    name = _SHARED_MID if shared and segment.kind is SegmentKind.MID else segment.name
    path, spec = directory / f"{name}.onnx", segment_spec(source.config, segment, precision)
    with _writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        if shared:
            graph = Graph(name, None)
            _write(graph, source.config, spec, precision, ShapeParts(source.config, precision.activations), shared=True)
            return _saved(graph, None, spec, path)
        return _embedded(source, spec, precision, path, search=search)


def _embedded(
    source: WeightSource, spec: SegmentSpec, precision: Precision, path: Path, *, search: bool
) -> SegmentFile:
    unfinished = path.with_suffix(".bin.tmp")
    try:
        with DataFile(unfinished, name=path.with_suffix(".bin").name) as data:
            graph = Graph(path.stem, data)
            parts = KeptParts(source, precision, search=search)
            _write(graph, source.config, spec, precision, parts, shared=False)
        return _saved(graph, data, spec, path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def bindings(
    config: Gemma3Config, weights: Gemma3Weights, segment: Segment, precision: Precision
) -> Mapping[str, Tensor]:
    """The tensors of `weights` that the graph of `segment` takes as inputs, by their names, in its order.

    They are the very tensors, wherever they are: nothing is copied. Their types are those of `weights`, which must be
    in `precision.activations`.

    Raises
    ------
    SegmentError
        If some matrices are quantised, or the weights are in another type.
    """
    if quantized := next(iter(_quantized(weights)), None):
        raise SegmentError(f"a {quantized} cannot be an input of a segment; export segments with weights embedded")
    if weights.text.embedding.dtype != precision.activations:
        raise SegmentError(
            f"weights in {weights.text.embedding.dtype} cannot be inputs of segments in {precision}, which are "
            f"{precision.activations}; load them in that type"
        )
    graph = Graph(segment.name, None)
    _write(graph, config, segment_spec(config, segment, precision), precision, MemoryParts(weights), shared=True)
    return graph.weights


def _quantized(weights: Gemma3Weights) -> set[str]:
    """Kinds of quantised matrices among `weights`."""
    matrices: list[Weight] = [weights.text.head]
    for layer in weights.text.layers:
        matrices += layer.qkv, layer.out, layer.gate_up, layer.down
    return {type(matrix).__name__ for matrix in matrices if not isinstance(matrix, Tensor)}


def _write(
    graph: Graph, config: Gemma3Config, spec: SegmentSpec, precision: Precision, parts: Parts, *, shared: bool
) -> None:
    """The nodes of a segment. A graph that is shared by layers names none of them."""
    segment, last = spec.segment, config.text.num_layers - 1
    decoder = DecoderGraphs(config.text, precision)
    match segment.kind:
        case SegmentKind.FIRST:
            decoder.first(graph, spec, parts.layer_start(0), name="layer.0")
        case SegmentKind.MID:
            names = ("layer", "next_layer") if shared else (f"layer.{segment.layer}", f"layer.{segment.layer + 1}")
            end, start = parts.layer_end(segment.layer), parts.layer_start(segment.layer + 1)
            decoder.mid(graph, spec, end, start, names=names)
        case SegmentKind.LAST:
            decoder.last(graph, spec, parts.layer_end(last), parts.norm(), parts.head(), name=f"layer.{last}")
        case SegmentKind.VISION:
            VisionGraph(config, precision).write(graph, spec, parts.vision())
        case _:
            assert_never(segment.kind)


def _saved(graph: Graph, data: DataFile | None, spec: SegmentSpec, path: Path) -> SegmentFile:
    unfinished = path.with_suffix(".onnx.tmp")
    graph.save(unfinished)
    weights = tuple(TensorSpec(name, w.dtype, tuple(w.shape)) for name, w in graph.weights.items())
    file = SegmentFile(spec, path, weights, nbytes=0)
    if data is not None and data.path.stat().st_size:
        data.path.replace(file.data)
    else:
        file.data.unlink(missing_ok=True)
    unfinished.replace(path)
    return replace(file, nbytes=file.stored_bytes())


def _check(source: WeightSource, precision: Precision, weights: WeightsAs) -> None:
    """Before anything is read: whether the model can be so."""
    if weights == "inputs" and precision in (Precision.INT4, Precision.FP8):
        raise SegmentError(
            f"weights in {precision} cannot be inputs: libraries take them apart when they build; embed them"
        )
    if not source.quantized:  # Those that are come with groups of their own.
        check_fits(source.config, precision)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SegmentError(
            f"{path} cannot be written: {error.strerror or error}; what is complete stays, so run it again when "
            "that is mended"
        ) from None


def _with_complete(wanted: SegmentSet, config: Gemma3Config) -> SegmentSet:
    """`wanted` with the segments that an earlier export of just that left whole."""
    for name in (_UNFINISHED, MANIFEST):
        with suppress(SegmentError):
            earlier = SegmentSet.read(wanted.directory, name=name, whole=False)
            if replace(earlier, files={}) == wanted:
                specs = {segment: segment_spec(config, segment, wanted.precision) for segment in segments(config)}
                return replace(
                    wanted, files={s: file for s, file in earlier.files.items() if specs.get(s) == file.spec}
                )
    return wanted


def _remove_others(directory: Path, exported: SegmentSet) -> None:
    """Files of earlier exports."""
    ours = {path for file in exported.files.values() for path in (file.path, file.data)}
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path not in ours:
            path.unlink()


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size * _SPARE > free:
        raise SegmentError(
            f"{directory} needs {disk_size(size * _SPARE)}, and its disk has {disk_size(free)} free; "
            "free some, or choose another directory"
        )
