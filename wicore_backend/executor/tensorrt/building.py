"""From a segment's ONNX file to an engine in a file, on a machine that may have no GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.manifest import SegmentFile
from wicore_backend.executor.tensorrt.description import report_of_description
from wicore_backend.executor.tensorrt.inspection import check_contract, report_of_network
from wicore_backend.executor.tensorrt.library import Library, LibraryName, Messages
from wicore_backend.executor.tensorrt.profiles import Profile, profiles_of
from wicore_backend.executor.tensorrt.records import EngineRecord, EngineReport

_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Target:
    """What engines are built for.

    Attributes
    ----------
    compute_capability
        "sm89"
    """

    library: LibraryName
    compute_capability: str
    precision: Precision


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build.

    Attributes
    ----------
    weight_streaming
        Let weights stay in host memory when the engine is run, as far as a budget says then. Such engines allocate
        while they run, so that no CUDA graph can have them.
    optimization_level
        0 to 5, of libraries that time kernels: more takes longer. None is the library's own.
    threads
        Of one build.
    """

    weight_streaming: bool = False
    optimization_level: int | None = None
    threads: int = 1


_DEFAULTS = BuildOptions()


def build_engine(
    file: SegmentFile,
    path: Path,
    *,
    target: Target,
    profiles: Sequence[Profile],
    library: Library,
    timing_cache: Path | None = None,
    options: BuildOptions = _DEFAULTS,
) -> EngineRecord:
    """Build the engine of a segment into `path`, which is there only when it is whole.

    Parameters
    ----------
    timing_cache
        A file that keeps what kernels took, for the next build; read and written where the library measures.

    Returns
    -------
    EngineRecord
        For `EngineFolder.add`. Its engine is held against the contract, as the library describes it if it does, else
        by the network that it was made of.

    Raises
    ------
    ExecutorError
        If the library cannot parse or build it: names the segment, the node, and what the library said.
    """
    began = time.monotonic()
    api, messages = library.api, library.messages()
    name = file.spec.segment.name
    ours = profiles_of(file.spec, profiles)
    builder = api.Builder(messages.logger)
    builder.max_threads = options.threads
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser keeps the tensors of the file in memory, which the network refers to.
    parser = _parse(file, network, library, messages)
    config = _configure(builder, library, target, options)
    _add_profiles(config, builder, file, ours, messages)
    cache = _attach_timings(config, timing_cache) if library.times_kernels else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExecutorError(
            f"{library} could not build {name} in {target.precision} for {target.compute_capability}: "
            f"{messages.errors()}"
        )
    report = _report(network, file, ours, library, messages, plan_bytes=plan.nbytes)
    del parser
    check_contract(report, file.spec, weights=file.weights, profiles=ours, what=str(file.path))
    digest = _write(path, memoryview(plan))
    if cache is not None and timing_cache is not None:
        _write(timing_cache, memoryview(cache.serialize()))
    return EngineRecord(
        segments=(name,),
        file=path.name,
        nbytes=plan.nbytes,
        digest=digest,
        seconds=round(time.monotonic() - began, 3),
        report=report,
    )


def _parse(file: SegmentFile, network: Any, library: Library, messages: Messages) -> Any:
    parser = library.api.OnnxParser(network, messages.logger)
    if parser.parse_from_file(str(file.path)):
        return parser
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        problems.append(f"{where}{error.code().name.lower()}: {error.desc()}")
    raise ExecutorError(
        f"{library} cannot parse {file.spec.segment.name}, {file.path}: "
        f"{'; '.join(problems) or messages.errors()}; export it again, or build with a library that knows its operators"
    )


def _configure(builder: Any, library: Library, target: Target, options: BuildOptions) -> Any:
    api, config = library.api, builder.create_builder_config()
    if library.builds_for_other_cards:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.target(target.compute_capability), 0)
    elif (here := _card_here()) != target.compute_capability:
        raise ExecutorError(
            f"{library} builds for the card that it runs on, which is {here or 'not there'}, and not for "
            f"{target.compute_capability}; build there, or with tensorrt_rtx"
        )
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0  # A segment is one thing after the other, and part of a graph.
    if options.weight_streaming:
        config.set_flag(api.BuilderFlag.WEIGHT_STREAMING)
    elif hasattr(api.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)  # Else CUDA graphs cannot have it.
    if options.optimization_level is not None and library.times_kernels:
        config.builder_optimization_level = options.optimization_level
    return config


def _card_here() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _add_profiles(
    config: Any, builder: Any, file: SegmentFile, profiles: Sequence[Profile], messages: Messages
) -> None:
    for profile in profiles:
        made = builder.create_optimization_profile()
        for tensor in file.spec.inputs:
            made.set_shape(tensor.name, *profile.shapes(tensor))
        if config.add_optimization_profile(made) < 0:
            raise ExecutorError(
                f"{file.spec.segment.name} does not take the profile {profile.name!r}: {messages.errors()}; "
                "export it again"
            )


def _report(
    network: Any,
    file: SegmentFile,
    profiles: Sequence[Profile],
    library: Library,
    messages: Messages,
    *,
    plan_bytes: int,
) -> EngineReport:
    """What the library said of the engine; where it is one that says nothing, of the network that it is made of."""
    activations = messages.activations[-len(profiles) :]
    weight_bytes = messages.weights[-1] if messages.weights else plan_bytes
    if messages.description is not None:
        told = report_of_description(messages.description, weight_bytes=weight_bytes, activations=activations)
        if told is not None:
            return told
    return report_of_network(network, profiles, file.spec, library, weight_bytes=weight_bytes, activations=activations)


def _attach_timings(config: Any, path: Path | None) -> Any:
    """What kernels took in builds before, those of another card or library left out; None where nothing is kept."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write(path: Path, data: memoryview) -> str:
    """Put `data` in a file, all or nothing. Returns its xxh3-128."""
    digest = xxh3_128()
    unfinished = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("wb") as out:
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                digest.update(part)
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ExecutorError(
            f"{path} cannot be written: {error}; free space there, or give another directory"
        ) from error
    return digest.hexdigest()
