"""A stand-in for TensorRT's Python module: the API's names, ONNX Runtime on a CPU, and the real one's strictness.

An "engine" is the path of an ONNX file and what it was built with. What the library would refuse, or would answer with
rubbish, is refused here: names that an engine does not have, shapes outside of a profile, addresses, memory or weights
that were never given, objects whose owner has gone. Results are full of NaN before they are computed, and the memory
for activations after, so that neither can hold anything else.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime

from wicore_backend.executor.tensorrt.library import Library, LibraryName

__version__ = "1.7.1.116"
STREAM, SIDE_STREAM = 7, 8
_MAGIC = b"stand-in"
_ELEMENTS = {"tensor(float)": 1, "tensor(int64)": 7, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_WIDTHS = {"tensor(float)": 4, "tensor(int64)": 8, "tensor(float16)": 2, "tensor(bfloat16)": 2}


class DataType(Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    BF16 = "tensor(bfloat16)"
    INT64 = "tensor(int64)"
    INT4 = "tensor(int4)"


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class EngineStat(IntEnum):
    TOTAL_WEIGHTS_SIZE, STRIPPED_WEIGHTS_SIZE = range(2)


class EngineValidity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY, EAGER, NONE = range(3)


class LayerInformationFormat(IntEnum):
    ONELINE, JSON = range(2)


class ComputeCapability(IntEnum):
    SM75, SM89, SM120 = 75, 89, 120


class ILogger(ABC):
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    @abstractmethod
    def log(self, severity: Any, msg: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The content of a serialized engine.

    Attributes
    ----------
    compute_capability
        What it was built for.
    ranges
        Of each input that differs from step to step, the least, usual and largest shape in each profile.
    fault
        What it does wrong: "open", "weights", "context", "execute" or "capture".
    """

    onnx: str
    compute_capability: str
    ranges: Mapping[str, Any]
    weight_bytes: int
    activation_bytes: tuple[int, ...]
    streams_weights: bool = False
    fault: str | None = None

    def serialized(self) -> bytes:
        return _MAGIC + json.dumps(asdict(self)).encode()


@dataclass
class Told:
    """What the executor told the library, for tests."""

    addresses: int = 0
    shapes: int = 0
    contexts: int = 0
    executions: list[int] = field(default_factory=list)
    """The stream of each."""
    strategies: list[int] = field(default_factory=list)
    alive: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """The contexts that still are."""
    budgets: dict[str, int] = field(default_factory=dict)


TOLD = Told()
_LOGGERS: list[ILogger] = []
"""That the library has been given in this process."""
CARD = SimpleNamespace(compute_capability="sm89")
"""That the library finds."""


def forget() -> None:
    """Begin to count anew."""
    global TOLD
    TOLD = Told()


class Runtime:
    _engines: type[ICudaEngine]

    def __init__(self, logger: ILogger) -> None:
        _LOGGERS.append(logger)
        self.logger = _LOGGERS[0]  # Others are ignored, as by the real one.
        self.defer_weights_loading = False

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        plan = _parsed(buffer)
        if plan is None:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        if plan.compute_capability != CARD.compute_capability:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        plan = _parsed(serialized_engine)
        if plan is None or plan.fault == "open":
            self.logger.log(ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: magicTag does not match")
            return None
        return self._engines(self, plan, deferred=getattr(self, "defer_weights_loading", False))


class ICudaEngine:
    _contexts: type[IExecutionContext]

    def __init__(self, runtime: Runtime, plan: Plan, *, deferred: bool) -> None:
        self._runtime = weakref.ref(runtime)
        self._logger = runtime.logger
        self._plan = plan
        self._deferred = deferred
        self.weights_loaded = not deferred
        self._session = _session(plan.onnx)
        self._nodes = {node.name: node for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._budget = plan.weight_bytes

    @property
    def num_io_tensors(self) -> int:
        return len(self._nodes)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.activation_bytes)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self._plan.activation_bytes)

    @property
    def streamable_weights_size(self) -> int:
        return self._plan.weight_bytes if self._plan.streams_weights else 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert self._plan.streams_weights, "the engine was not built to stream weights"
        assert 0 <= budget <= self._plan.weight_bytes
        TOLD.budgets[Path(self._plan.onnx).stem] = budget
        self._budget = budget

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._nodes)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._nodes[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._nodes[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name in self._inputs, "only inputs have ranges"
        return [tuple(shape) for shape in self._plan.ranges[name][profile_index]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.activation_bytes[profile_index]

    def get_engine_stat(self, stat: EngineStat) -> int:
        assert stat is EngineStat.TOTAL_WEIGHTS_SIZE
        return self._plan.weight_bytes

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        config = strategy if isinstance(strategy, IRuntimeConfig) else IRuntimeConfig(strategy)
        if self._plan.fault == "context":
            self._logger.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 8192 bytes.)")
            return None
        TOLD.contexts += 1
        TOLD.strategies.append(int(config.dynamic_shapes_kernel_specialization_strategy))
        if config._cache is not None:
            config._cache.compiled += 1
        return self._contexts(self, config)

    def load_weights(self, blob: Any) -> bool:
        if not self._deferred or self.weights_loaded or _parsed(blob) != self._plan or self._plan.fault == "weights":
            self._logger.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (weights)")
            return False
        self.weights_loaded = True
        return True


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        layer = {"Name": "mm", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format/Datatype": "BFloat16"}]}
        return json.dumps({"Layers": [layer, "a name alone"]})


class IRuntimeCache:
    def __init__(self) -> None:
        self.compiled = 0

    def deserialize(self, blob: bytes) -> bool:
        if not bytes(blob).startswith(b"kernels "):
            return False
        self.compiled = int(bytes(blob).split()[1])
        return True

    def serialize(self) -> memoryview:
        return memoryview(f"kernels {self.compiled}".encode())


class IRuntimeConfig:
    def __init__(self, strategy: Any = None) -> None:
        self._strategy = strategy
        self._cache: IRuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.NONE

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine = weakref.ref(engine)
        self._config = config
        self._binding = engine._session.io_binding()
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        TOLD.alive.add(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        if not 0 <= profile_index < self._alive().num_optimization_profiles:
            return self._refuse(f"no profile {profile_index}")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0, "memory has to lie at a round address"
        self._memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        engine = self._alive()
        TOLD.shapes += 1
        if name not in engine._inputs:
            return self._refuse(f"Given invalid tensor name: {name}")
        assert self._profile is not None, "a context has no profile before it is given one"
        ranges = engine._plan.ranges.get(name)
        fixed = engine.get_tensor_shape(name)
        least, most = (fixed, fixed) if ranges is None else (ranges[self._profile][0], ranges[self._profile][2])
        inside = len(shape) == len(fixed) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not inside:
            return self._refuse(f"Set dimension {shape} for tensor {name} does not satisfy any optimization profiles.")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        TOLD.addresses += 1
        if name not in self._alive()._nodes:
            return self._refuse(f"Given invalid tensor name: {name}")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == SIDE_STREAM, "the default stream can never be captured"
        engine = self._alive()
        assert engine._plan.ranges.keys() <= self._shapes.keys(), "shapes have to be known"
        return engine._plan.fault != "capture" and not engine._plan.streams_weights

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._alive()
        TOLD.executions.append(stream_handle)
        if engine._plan.fault == "execute":
            return self._refuse("IExecutionContext::enqueueV3: Error Code 1: Cuda Driver (an illegal memory access)")
        if not engine.weights_loaded:
            return self._refuse("weights have not been loaded")
        if self._config._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            return self._refuse("memory of its own was not asked for")
        if self._memory is None or self._memory[1] < engine._plan.activation_bytes[self._profile or 0]:
            return self._refuse("Device memory is too small")
        for name in engine._nodes:
            if not self._addresses.get(name):
                return self._refuse(f"Address is not set for tensor {name}")
            if name in engine._plan.ranges and name not in self._shapes:
                return self._refuse(f"Shape is not set for tensor {name}")
        self._compute(engine)
        ctypes.memset(self._memory[0], 0xFF, engine._plan.activation_bytes[self._profile or 0])
        return True

    def _compute(self, engine: ICudaEngine) -> None:
        letters: dict[str, int] = {}
        for node in engine._session.get_inputs():
            shape = self._shapes.get(node.name, tuple(node.shape))
            letters |= {letter: size for letter, size in zip(node.shape, shape, strict=True) if isinstance(letter, str)}
            self._binding.bind_input(node.name, "cpu", 0, _ELEMENTS[node.type], shape, self._addresses[node.name])
        for node in engine._session.get_outputs():
            shape = tuple(letters.get(size, size) for size in node.shape)
            address, count = self._addresses[node.name], 1
            for size in shape:
                count *= size
            ctypes.memset(address, 0xFF, count * _WIDTHS[node.type])
            self._binding.bind_output(node.name, "cpu", 0, _ELEMENTS[node.type], shape, address)
        engine._session.run_with_iobinding(self._binding)

    def _alive(self) -> ICudaEngine:
        engine = self._engine()
        assert engine is not None, "the engine of this context has been freed"
        assert engine._runtime() is not None, "the runtime of this engine has been freed"
        return engine

    def _refuse(self, message: str) -> bool:
        self._alive()._logger.log(ILogger.Severity.ERROR, message)
        return False


Runtime._engines = ICudaEngine
ICudaEngine._contexts = IExecutionContext


def _parsed(buffer: Any) -> Plan | None:
    content = bytes(buffer)
    if not content.startswith(_MAGIC):
        return None
    fields = json.loads(content[len(_MAGIC) :])
    return Plan(**fields | {"activation_bytes": tuple(fields["activation_bytes"])})


_SESSIONS: dict[str, onnxruntime.InferenceSession] = {}


def _session(path: str) -> onnxruntime.InferenceSession:
    if path not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        _SESSIONS[path] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _SESSIONS[path]


class _Without:
    """Lacks some names that its class has."""

    _lacking: frozenset[str]

    def __getattribute__(self, name: str) -> Any:
        if name in type(self)._lacking:
            raise AttributeError(name)
        return super().__getattribute__(name)


class PlainContext(_Without, IExecutionContext):
    _lacking = frozenset({"is_stream_capturable"})


class PlainEngine(_Without, ICudaEngine):
    _lacking = frozenset({"create_runtime_config", "get_engine_stat", "load_weights"})
    _contexts = PlainContext


class PlainRuntime(_Without, Runtime):
    """Without what only TensorRT-RTX, or only a new TensorRT, has."""

    _lacking = frozenset({"defer_weights_loading", "get_engine_validity"})
    _engines = PlainEngine


def library(*, rtx: bool = True) -> Library:
    """The stand-in as TensorRT-RTX, or as TensorRT, which lacks what that does not have."""
    api: Any = SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
    if rtx:
        return Library(LibraryName.TENSORRT_RTX, __version__, api)
    for name in ("ComputeCapability", "IRuntimeCache", "IRuntimeConfig", "EngineValidity"):
        delattr(api, name)

    api.Runtime = PlainRuntime
    return Library(LibraryName.TENSORRT, "10.16.0", api)
