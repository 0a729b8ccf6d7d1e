"""From files to engines and contexts on a card."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Segment, SegmentKind, SegmentSpec, TensorSpec
from wicore_backend.executor.tensorrt.card import Card
from wicore_backend.executor.tensorrt.contexts import ALIGNMENT, SegmentContexts
from wicore_backend.executor.tensorrt.inspection import check_contract, report_of_engine
from wicore_backend.executor.tensorrt.kernel_cache import KernelCache
from wicore_backend.executor.tensorrt.library import Library, Messages
from wicore_backend.executor.tensorrt.profiles import profiles_of
from wicore_backend.executor.tensorrt.records import EngineRecord
from wicore_backend.executor.tensorrt.store import EngineSet

_THREADS = 4
"""That read, check and open engines: more would only wait for the disk."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Opened:
    """An engine, and what has to live as long as it."""

    record: EngineRecord
    engine: Any
    runtime: Any
    plan: mmap.mmap | None
    """Its file, while its weights are not on the card."""


class EngineLoader:
    """Opens the engines of a set, and makes segments of them that can be executed.

    Weights come last, where the library can do without them that long: what else is wrong is said before gigabytes
    have been copied.

    Parameters
    ----------
    weights
        By segment, those that are inputs.
    streaming_budget
        Bytes of weights that may be on the card; None has them all there.
    """

    def __init__(
        self,
        engines: EngineSet,
        specs: Mapping[Segment, SegmentSpec],
        weights: Mapping[Segment, Mapping[str, Tensor]],
        *,
        library: Library,
        card: Card,
        messages: Messages,
        kernels: KernelCache,
        streaming_budget: int | None,
    ) -> None:
        self._engines = engines
        self._specs = specs
        self._weights = weights
        self._library = library
        self._card = card
        self._messages = messages
        self._kernels = kernels
        self._streaming_budget = streaming_budget

    def load(self) -> Mapping[Segment, SegmentContexts]:
        """Every segment, its weights in place.

        Raises
        ------
        ExecutorError
            If an engine cannot be opened: names its file, and what the library said; if it is not what the contract
            says; if the card's memory does not suffice after all.
        """
        records = self._engines.records
        with ThreadPoolExecutor(min(_THREADS, len(records)), initializer=self._enter) as pool:
            opened = {one.record.file: one for one in pool.map(self._open, records)}
        self._share_budget([one.engine for one in opened.values()])
        # The tower computes beside the decoder, on a stream of its own.
        tower, decoder = (
            self._arena(
                [one.engine for one in opened.values() if (SegmentKind.VISION in one.record.segments) == seeing]
            )
            for seeing in (True, False)
        )
        segments = {}
        for segment, record in self._engines.engines.items():
            arena = tower if segment.kind is SegmentKind.VISION else decoder
            contexts = self._contexts(segment, opened[record.file], self._weights.get(segment, {}), arena)
            contexts.open()
            segments[segment] = contexts
        for one in opened.values():
            self._load_weights(one)
        return segments

    def _enter(self) -> None:
        if self._card.device.type == "cuda":
            torch.cuda.set_device(self._card.device)

    def _open(self, record: EngineRecord) -> _Opened:
        self._messages.own_errors()  # Forgotten: of files that this thread has opened before.
        plan = self._engines.read(record)
        path = self._engines.directory / record.file
        runtime = self._library.api.Runtime(self._messages.logger)
        self._check_validity(runtime, plan, path)
        deferred = hasattr(runtime, "defer_weights_loading") and not self._engines.key.weight_streaming
        if deferred:
            runtime.defer_weights_loading = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ExecutorError(
                f"{self._library} cannot open {path} on {self._card.name}: {self._messages.own_errors()}; if it was "
                "built for this card and this version of the library, delete it and run the build command again"
            )
        self._check_contract(engine, record, path)
        if not deferred:
            plan.close()
        return _Opened(record, engine, runtime, plan if deferred else None)

    def _check_validity(self, runtime: Any, plan: mmap.mmap, path: Path) -> None:
        """What the library tells from an engine's first bytes, where it can."""
        if not hasattr(runtime, "get_engine_validity"):
            return
        api = self._library.api
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == api.EngineValidity.INVALID:
            reasons = api.EngineInvalidityDiagnostics.__members__.items()
            told = [name.lower().replace("_", " ") for name, bit in reasons if int(diagnostics) & int(bit)]
            why = ", ".join(told) or self._messages.own_errors()
            key = self._engines.key
            raise ExecutorError(
                f"{path}, built by {key.library} {key.version} for {key.compute_capability}, cannot run on "
                f"{self._card.name} ({self._card.compute_capability}) with {self._library}: {why}"
            )

    def _check_contract(self, engine: Any, record: EngineRecord, path: Path) -> None:
        spec = next(spec for segment, spec in self._specs.items() if segment.name == record.segments[0])
        profiles = profiles_of(spec, self._engines.key.profiles)
        given = self._weights.get(spec.segment, {})
        weights = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()]
        report = report_of_engine(engine, self._library)
        check_contract(report, spec, weights=weights, profiles=profiles, what=str(path))

    def _share_budget(self, engines: Sequence[Any]) -> None:
        """Give each engine its part of the weights that may be on the card."""
        if not self._engines.key.weight_streaming:
            return
        total = sum(engine.streamable_weights_size for engine in engines)
        budget = total if self._streaming_budget is None else min(total, self._streaming_budget)
        _log.info("%.2f of %.2f GiB of weights stay on the card; the rest is streamed", budget / 2**30, total / 2**30)
        for engine in engines:
            engine.weight_streaming_budget_v2 = engine.streamable_weights_size * budget // max(1, total)

    def _arena(self, engines: Sequence[Any]) -> Tensor:
        """Memory for the activations of whichever of the engines executes."""
        size = max((engine.device_memory_size_v2 for engine in engines), default=0)
        memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self._card.device)
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + size]

    def _contexts(
        self, segment: Segment, opened: _Opened, weights: Mapping[str, Tensor], arena: Tensor
    ) -> SegmentContexts:
        spec = self._specs[segment]
        profiles = profiles_of(spec, self._engines.key.profiles)

        def new_context(profile: int, *, of_one_size: bool) -> Any:
            context = self._new_context(opened.engine, of_one_size=of_one_size)
            made = context is not None and context.set_optimization_profile_async(profile, self._card.stream())
            if not made:
                raise ExecutorError(
                    f"{self._library} has no context for {segment.name} on {self._card.name}: "
                    f"{self._messages.errors()}; with too little memory, lower kv_cache_bytes or max_batch_tokens"
                )
            context.set_device_memory(arena.data_ptr(), arena.nbytes)
            return context

        return SegmentContexts(
            spec,
            profiles=profiles,
            weights=weights,
            new_context=new_context,
            card=self._card,
            messages=self._messages,
        )

    def _new_context(self, engine: Any, *, of_one_size: bool) -> Any:
        """A context, without memory. For one size it waits until kernels for that are compiled; else who comes with a
        new size does not wait, and those are compiled in the background."""
        api = self._library.api
        managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.configures_contexts:
            return engine.create_execution_context(managed)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED  # Whole steps are recorded, by the engine.
        strategies = api.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if of_one_size else strategies.LAZY
        self._kernels.attach(config)
        return engine.create_execution_context(config)

    def _load_weights(self, opened: _Opened) -> None:
        if opened.plan is None:
            return
        if not opened.engine.load_weights(opened.plan):
            raise ExecutorError(
                f"the weights of {opened.record.file} cannot be copied to {self._card.name}: "
                f"{self._messages.errors()}; with too little memory, lower kv_cache_bytes or max_batch_tokens"
            )
        opened.plan.close()
        opened.plan = None
