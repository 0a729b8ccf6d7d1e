"""Builds what is missing of a model's engines, several at once within a memory budget, in as many runs as it takes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.engine_build.estimates import Part, available_memory, check_disk, check_memory, disk_needed
from scripts.engine_build.worker import Built, Order, begin, build
from wicore_backend.errors import ExecutorError, SegmentError
from wicore_backend.executor.segments.contract import Segment
from wicore_backend.executor.segments.exclusive import alone_in, exporting_alone
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.manifest import SegmentFile, SegmentSet
from wicore_backend.executor.tensorrt.building import BuildOptions, Target
from wicore_backend.executor.tensorrt.records import EngineKey
from wicore_backend.executor.tensorrt.store import EngineFolder
from wicore_backend.observability.progress import ByteProgress

_GRAPHS = "graphs"
"""Below the engines, for graphs that are dropped once their engine is there."""
_LOCK = ".building"

_log = logging.getLogger(__name__)

Began = Callable[[Part], None]
Ended = Callable[[Part, Built], None]
Submit = Callable[[Order], "Future[Built]"]


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
    replace
        Give up engines of another model or other settings that are where these go.
    """

    def __init__(
        self,
        model: Path,
        root: Path,
        key: EngineKey,
        parts: Sequence[Part],
        *,
        options: BuildOptions,
        keep_onnx: bool,
        replace: bool,
    ) -> None:
        self.key = key
        self.directory = root / key.folder
        self._model = model
        self._root = root
        self._parts = parts
        self._options = options
        self._keep_onnx = keep_onnx
        self._replace = replace

    def missing(self) -> Sequence[Part]:
        """Parts whose engine is not there yet. Changes nothing.

        Raises
        ------
        ExecutorError
            If others are there that are not to be replaced.
        """
        if not self.directory.exists():
            return self._parts
        lacking = set(self._folder().missing([s for part in self._parts for s in part.segments]))
        return [part for part in self._parts if lacking & set(part.segments)]

    def check(self, todo: Sequence[Part], limits: Limits) -> None:
        """Whether disk and memory suffice for `todo`.

        Raises
        ------
        ExecutorError
            If not.
        """
        check_disk(self._root, disk_needed(todo, jobs=limits.jobs, keep_onnx=self._keep_onnx))
        check_memory(todo, limits.budget)

    def run(self, todo: Sequence[Part], limits: Limits, began: Began, ended: Ended) -> None:
        """Build `todo`, what was `missing`; each engine is on disk, and in `engines.json`, before `ended` hears of it.

        Raises
        ------
        WicoreError
            If disk or memory do not suffice, another process builds the same engines, one cannot be built, or a process
            died. What is built by then stays.
        """
        self.check(todo, limits)
        with _alone(self.directory):
            folder = self._folder()
            for unfinished in self.directory.glob("*.engine.tmp"):
                unfinished.unlink()
            graphs = self._graphs()
            orders = [(part, self._order(part, graphs)) for part in todo]
            with _emptied(self.directory / _GRAPHS), _workers(limits.jobs) as submit:
                for part, built in build_all(orders, limits, submit, began):
                    folder.add(built.record)
                    ended(part, built)

    def _folder(self) -> EngineFolder:
        return EngineFolder.open(self._root, self.key, replace=self._replace)

    def _order(self, part: Part, graphs: Mapping[Segment, SegmentFile]) -> Order:
        first = part.segments[0]
        return Order(
            model=self._model,
            segments=part.segments,
            weights=self.key.weights,
            graph=graphs.get(first),
            graphs=self.directory / _GRAPHS,
            search=self.key.searched,
            engine=self.directory / f"{first.name}.engine",
            target=Target(self.key.library, self.key.compute_capability, self.key.precision),
            profiles=self.key.profiles,
            options=self._options,
            timing_cache=self.directory / "timings.cache",
        )

    def _graphs(self) -> Mapping[Segment, SegmentFile]:
        """Those that stay: exported now, or before for other engines of the same model."""
        directory, precision, weights = self._root / self.key.precision, self.key.precision, self.key.weights
        if self._keep_onnx:
            with exporting_alone(directory), ByteProgress("exporting", _log) as progress:
                kept = export_segments(
                    self._model, directory, precision, weights=weights, search=self.key.searched, progress=progress
                )
            return kept.files
        try:
            kept = SegmentSet.read(directory)
        except SegmentError:
            return {}
        found, wanted = (kept.fingerprint, kept.weights, kept.searched), (self.key.model, weights, self.key.searched)
        return kept.files if found == wanted else {}


@contextmanager
def _emptied(directory: Path) -> Iterator[None]:
    """A directory that is empty at first and gone in the end."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _workers(jobs: int) -> Iterator[Submit]:
    """Processes that build, which end with this context, and with this process however it ends."""
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin, initargs=(os.getpid(),)
    )
    try:
        yield lambda order: pool.submit(build, order)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.join()


def build_all(
    orders: Sequence[tuple[Part, Order]], limits: Limits, submit: Submit, began: Began
) -> Iterator[tuple[Part, Built]]:
    """Each order's engine as it is done: at most `limits.jobs` at once, and so many that their memory is in the budget.

    Raises
    ------
    WicoreError
        As the first build that fails does; if one of them alone takes more memory than there is by now.
    """
    waiting = sorted(orders, key=lambda order: -order[0].memory_bytes) if limits.jobs > 1 else list(orders)
    budget, running = limits.budget, dict[Future[Built], Part]()
    check_memory([part for part, _ in orders], budget)  # Else it would wait for ever.
    while waiting or running:
        free = budget - sum(part.memory_bytes for part in running.values())
        fits = next((order for order in waiting if order[0].memory_bytes <= free), None)
        if fits is not None and len(running) < limits.jobs:
            waiting.remove(fits)
            part, order = fits
            began(part)
            running[submit(order)] = part
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            part = running.pop(future)
            yield part, _result(future, [part, *running.values()])


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
    """That no other process builds in `directory` meanwhile: see `alone_in`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(directory, _LOCK, wait=False))
        except BlockingIOError:
            raise ExecutorError(f"another process builds in {directory}; wait for it, or end it") from None
        except OSError as error:
            raise ExecutorError(
                f"{directory} cannot be written to: {error.strerror}; name another with --engines"
            ) from None
        yield
