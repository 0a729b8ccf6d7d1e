"""Builds what is missing of a model's engines, several at once within a memory budget, in as many runs as it takes."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.engine_build.estimates import Part, available_memory, check_disk, check_memory, disk_needed
from scripts.engine_build.worker import Built, Order, begin, build
from wicore_backend.errors import ExecutorError, SegmentError
from wicore_backend.executor.segments.contract import Segment
from wicore_backend.executor.segments.manifest import SegmentFile, SegmentSet
from wicore_backend.executor.tensorrt.building import BuildOptions, Target
from wicore_backend.executor.tensorrt.records import EngineKey
from wicore_backend.executor.tensorrt.store import EngineFolder

_GRAPHS = "graphs"
"""Below the engines, for graphs that are dropped once their engine is there."""

_log = logging.getLogger(__name__)

Began = Callable[[Part], None]
Ended = Callable[[Part, Built], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what building may take.

    Attributes
    ----------
    jobs
        Builds at once.
    memory
        Bytes that they may have together; None is what the machine has free.
    """

    jobs: int = 1
    memory: int | None = None

    @property
    def budget(self) -> int:
        return self.memory or available_memory()


class Build:
    """The engines of one model and key: what of them is there, and the rest to be built.

    Parameters
    ----------
    root
        Of all engines of the model.
    parts
        All that the model has.
    search
        Of matrices that are rounded to INT4: `export_segment`'s.
    """

    def __init__(
        self,
        model: Path,
        root: Path,
        key: EngineKey,
        parts: Sequence[Part],
        *,
        options: BuildOptions,
        search: bool,
        keep_onnx: bool,
    ) -> None:
        self.key = key
        self.directory = root / key.folder
        self._model = model
        self._root = root
        self._parts = parts
        self._options = options
        self._search = search
        self._keep_onnx = keep_onnx

    def missing(self) -> Sequence[Part]:
        """Parts whose engine is not there yet. Changes nothing."""
        if not self.directory.exists():
            return self._parts
        lacking = set(
            EngineFolder.open(self._root, self.key).missing([s for part in self._parts for s in part.segments])
        )
        return [part for part in self._parts if lacking & set(part.segments)]

    def check(self, limits: Limits) -> None:
        """Whether disk and memory suffice for what is missing.

        Raises
        ------
        ExecutorError
            If not.
        """
        todo = self.missing()
        check_disk(self._root, disk_needed(todo, jobs=limits.jobs, keep_onnx=self._keep_onnx))
        check_memory(todo, limits.budget)

    def run(self, limits: Limits, began: Began, ended: Ended) -> None:
        """Build what is missing; each engine is on disk, and in `engines.json`, before `ended` hears of it.

        Raises
        ------
        WicoreError
            If disk or memory do not suffice, another process builds the same engines, one cannot be built, or a process
            died. What is built by then stays.
        """
        self.check(limits)
        folder = EngineFolder.open(self._root, self.key)
        with _alone(self.directory):
            for name in self.directory.glob("*.engine.tmp"):
                name.unlink()
            shutil.rmtree(self.directory / _GRAPHS, ignore_errors=True)
            graphs = {} if (there := self._exported()) is None else dict(there.files)
            for part, built in _built(self._orders(self.missing(), graphs), limits, began):
                folder.add(built.record)
                if built.graph is not None:
                    graphs |= dict.fromkeys(part.segments, built.graph)
                ended(part, built)
            shutil.rmtree(self.directory / _GRAPHS, ignore_errors=True)
            if self._keep_onnx and there is None:
                self._keep(graphs)

    def _orders(self, parts: Sequence[Part], graphs: dict[Segment, SegmentFile]) -> list[tuple[Part, Order]]:
        kept = self._root / self.key.precision
        directory = kept if self._keep_onnx else self.directory / _GRAPHS
        directory.mkdir(parents=True, exist_ok=True)
        return [
            (
                part,
                Order(
                    model=self._model,
                    segments=part.segments,
                    weights=self.key.weights,
                    graph=graphs.get(part.segments[0]),
                    graphs=directory,
                    keep_graph=self._keep_onnx,
                    search=self._search,
                    engine=self.directory / f"{part.segments[0].name}.engine",
                    target=Target(self.key.library, self.key.compute_capability, self.key.precision),
                    profiles=self.key.profiles,
                    options=self._options,
                    timing_cache=self.directory / "timings.cache",
                ),
            )
            for part in parts
        ]

    def _exported(self) -> SegmentSet | None:
        """Graphs of this model that were exported before, as these engines need them."""
        try:
            there = SegmentSet.read(self._root / self.key.precision)
        except SegmentError:
            return None
        fits = (there.fingerprint, there.weights) == (self.key.model, self.key.weights)
        return there if fits else None

    def _keep(self, graphs: dict[Segment, SegmentFile]) -> None:
        segments = [segment for part in self._parts for segment in part.segments]
        if missing := [segment.name for segment in segments if segment not in graphs]:
            _log.warning(
                "graphs are kept, without a list of them: %d of an earlier run are gone, %s first",
                len(missing),
                missing[0],
            )
            return
        directory = self._root / self.key.precision
        files = {segment: graphs[segment] for segment in segments}
        SegmentSet(directory, self.key.precision, self.key.model, self.key.weights, files).write()


def _built(orders: Sequence[tuple[Part, Order]], limits: Limits, began: Began) -> Iterator[tuple[Part, Built]]:
    """Each order's engine as it is done; the largest are begun first, as far as memory allows."""
    waiting = sorted(orders, key=lambda order: order[0].memory_bytes, reverse=True) if limits.jobs > 1 else list(orders)
    budget, running = limits.budget, dict[Future[Built], Part]()
    pool = ProcessPoolExecutor(
        limits.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin, initargs=(os.getpid(),)
    )
    try:
        while waiting or running:
            free = budget - sum(part.memory_bytes for part in running.values())
            fits = next((o for o in waiting if o[0].memory_bytes <= free), None) if len(running) < limits.jobs else None
            if fits is not None:
                waiting.remove(fits)
                began(fits[0])
                running[pool.submit(build, fits[1])] = fits[0]
                continue
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                part = running.pop(future)
                yield part, _result(future, [part, *running.values()])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.kill()


def _result(future: Future[Built], parts: Sequence[Part]) -> Built:
    try:
        return future.result()
    except BrokenProcessPool:
        names = " or ".join(part.name for part in parts)
        raise ExecutorError(
            f"the process that built {names} was killed, most likely for lack of memory; give fewer --jobs, or close "
            "what takes memory, and run the command again: it goes on with what is missing"
        ) from None


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """That no other process builds in `directory` meanwhile."""
    with (directory / ".building").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExecutorError(f"another process builds in {directory}; wait for it, or end it") from None
        yield
