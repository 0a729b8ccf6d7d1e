"""One build, in a process of its own: it gives its memory back, and the machine can kill it without harm."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from wicore_backend.executor.segments.contract import Segment
from wicore_backend.executor.segments.export import export_segment
from wicore_backend.executor.segments.manifest import SegmentFile, WeightsAs
from wicore_backend.executor.segments.source import WeightSource
from wicore_backend.executor.tensorrt.building import BuildOptions, Target, build_engine
from wicore_backend.executor.tensorrt.library import load_library
from wicore_backend.executor.tensorrt.profiles import Profile
from wicore_backend.executor.tensorrt.records import EngineRecord

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to build.

    Attributes
    ----------
    segments
        That the engine computes; its graph is that of the first.
    graph
        Exported already, or None.
    graphs
        Directory for the graph while it is needed, if it is not there.
    search
        `export_segment`'s.
    engine
        Where the engine goes.
    """

    model: Path
    segments: tuple[Segment, ...]
    weights: WeightsAs
    graph: SegmentFile | None
    graphs: Path
    search: bool
    engine: Path
    target: Target
    profiles: tuple[Profile, ...]
    options: BuildOptions
    timing_cache: Path


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, and what it took.

    Attributes
    ----------
    export_s, build_s
        Seconds.
    peak_bytes
        Of the process's memory.
    """

    record: EngineRecord
    export_s: float
    build_s: float
    peak_bytes: int


def begin(parent: int) -> None:
    """Before the first build of a process that `parent` started: it ends with it, and is nobody's competitor."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that builds engines has gone")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # What the library warns of is for who changes graphs; its errors are quoted where something fails.
    logging.getLogger("wicore_backend.executor.tensorrt.library").setLevel(logging.ERROR)


def build(order: Order) -> Built:
    """Export and build one engine.

    Raises
    ------
    WicoreError
        If the checkpoint, the graph or the library will not.
    """
    _reset_peak()
    segment, began = order.segments[0], time.monotonic()
    graph = order.graph
    if graph is None:
        source = _source(order.model)
        graph = export_segment(
            source, segment, order.target.precision, order.graphs, weights=order.weights, search=order.search
        )
    exported = time.monotonic()
    try:
        record = build_engine(
            graph,
            order.engine,
            target=order.target,
            profiles=order.profiles,
            library=load_library(order.target.library.value),
            timing_cache=order.timing_cache,
            options=order.options,
        )
    finally:
        if order.graph is None:
            for path in (graph.path, graph.data):
                path.unlink(missing_ok=True)
    record = record.model_copy(update={"segments": tuple(segment.name for segment in order.segments)})
    return Built(record, exported - began, time.monotonic() - exported, _peak())


@lru_cache(maxsize=1)
def _source(model: Path) -> WeightSource:
    return WeightSource.open(model)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
