"""Work as CUDA graphs: launched at once, in place of many kernels one by one."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

T = TypeVar("T")

ResultsT = TypeVar("ResultsT", bound=tuple[Tensor, ...], covariant=True)
"""A NamedTuple of tensors."""


class Recorded(Protocol[ResultsT]):
    """Work that does the same over the same memory, that of its results included, at each call."""

    def __call__(self) -> ResultsT: ...

    def lend(self) -> None:
        """Let what is recorded from now on have the memory of the results, which are then good until that is called."""


class Record(Protocol):
    """Makes work repeatable. What it compiles, loads and allocates once, a call before must have done."""

    def __call__(self, work: Callable[[], ResultsT], /) -> Recorded[ResultsT]: ...


class Sizes(Generic[T]):
    """What has been recorded for steps of some sizes, of which a step takes the smallest that holds it."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._recorded: dict[int, T] = {}

    def prepare(self, sizes: Sequence[int], record: Callable[[int], T], what: str) -> None:
        """Record all, the largest first, so that the others find room in its memory.

        Steps of a size for which that fails, for lack of memory for example, take that of the next larger one.
        """
        for number, size in enumerate(sorted(sizes, reverse=True), 1):
            try:
                self._recorded[size] = record(size)
            except Exception:
                _log.exception("%s of %d cannot be recorded as CUDA graphs; they will do without", what, size)
                continue
            _log.info("CUDA graphs of %s %d of %d: %d", what, number, len(sizes), size)
        self._sizes = sorted(self._recorded)

    def fitting(self, size: int) -> T | None:
        """Of the smallest size that is as large; None if there is none."""
        place = bisect_left(self._sizes, size)
        return None if place == len(self._sizes) else self._recorded[self._sizes[place]]


class Nothing(NamedTuple):
    """No results."""


class CudaRecorder:
    """`Record` by CUDA graphs that share their memory, so that they are to be replayed on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # Memory without a graph is gone for ever, also if its only graph could not be ended. This one stays.
        something = torch.zeros(1, device=device)

        def hold() -> Nothing:
            something.zero_()
            return Nothing()

        self._holder = self(hold)

    def __call__(self, work: Callable[[], ResultsT], /) -> Recorded[ResultsT]:
        graph = torch.cuda.CUDAGraph()
        # The default stream cannot be captured. `torch.cuda.graph` would also collect garbage, for each of hundreds.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile, to move blocks between tiers; that is no part of the graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = work()
            except BaseException:
                with suppress(Exception):  # A capture in which something failed cannot be ended well.
                    graph.capture_end()
                raise
            graph.capture_end()
        return _Graph(graph, results, work)


class _Graph(Recorded[ResultsT]):
    """A CUDA graph, to be called. It keeps the work, whose tensors' memory it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, results: ResultsT, work: Callable[[], ResultsT]) -> None:
        self._graph = graph
        self._results = results
        self._work = work

    def __call__(self) -> ResultsT:
        self._graph.replay()
        return self._results

    def lend(self) -> None:
        results = self._results
        self._results = type(results)(*map(_borrowed, results))


class _Span:
    """Memory of the device that somebody else owns, for `torch.as_tensor`."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "strides": None,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that does not keep it from being used otherwise."""
    values = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.as_tensor(_Span(tensor.data_ptr(), values * tensor.itemsize), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
