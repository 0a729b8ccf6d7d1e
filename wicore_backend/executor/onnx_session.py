"""ONNX Runtime's sessions over PyTorch's tensors: where they compute, and one graph that is given its tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from wicore_backend.errors import ExecutorError, SegmentError
from wicore_backend.executor.segments.contract import TensorSpec
from wicore_backend.executor.segments.given import check_given
from wicore_backend.executor.segments.manifest import SegmentFile

_log = logging.getLogger(__name__)

_ELEMENTS: Mapping[torch.dtype, int] = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""Numbers of onnx.TensorProto.DataType, which binding takes where numpy has no such type."""

_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "tensor(float)",
    torch.int64: "tensor(int64)",
    torch.float16: "tensor(float16)",
    torch.bfloat16: "tensor(bfloat16)",
}

_NO_SIZE_LIMIT = 0
_GROW_BY_POWERS_OF_TWO = 0
"""As requested, each of a row of steps of ever more tokens leaves memory that is too small for the next: 255 MiB, in
place of 14, after steps of up to 512 tokens of a small model, measured."""
_DEFAULT = -1


class OnnxRuntime:
    """ONNX Runtime on one device.

    On a CPU the sessions of a process share the memory that they compute in. They could share their threads too, but
    then all others in the process that use ONNX Runtime would have to. On CUDA they compute on a stream of their own,
    in order with the caller's.

    Parameters
    ----------
    threads
        CPU threads of an operator: those beyond the caller's are each session's own, and sleep while others run.

    Raises
    ------
    ExecutorError
        If the installed ONNX Runtime cannot compute on `device`.
    """

    def __init__(self, device: torch.device, *, threads: int) -> None:
        self.device = device
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3  # What is worth knowing of a graph is raised.
        # Steps differ in their number of tokens, and each number would leave a plan of its memory behind.
        self._options.enable_mem_pattern = False
        self._options.intra_op_num_threads = threads
        _share_memory()
        for name, value in _SHARING.items():
            self._options.add_session_config_entry(name, value)
        self._stream: torch.cuda.Stream | None = None
        self._run_options: onnxruntime.RunOptions | None = None
        self._providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            self._compute_on_cuda()

    def open(self, path: Path) -> onnxruntime.InferenceSession:
        """The graph in a file, ready to run.

        Raises
        ------
        SegmentError
            If it cannot be read, or holds what this ONNX Runtime cannot run.
        """
        try:
            session = onnxruntime.InferenceSession(path, self._options, providers=self._providers)
        except Exception as error:  # There is no class that its errors have in common.
            raise SegmentError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {_one_line(error)}; {again(path.parent)}"
            ) from None
        wanted = self._providers[0] if self.device.type == "cpu" else "CUDAExecutionProvider"
        if session.get_providers()[0] != wanted:
            raise ExecutorError(
                f"ONNX Runtime {onnxruntime.__version__} cannot use {self.device}: it wants the CUDA and cuDNN that it "
                "was built for, and says on stderr which it missed; install those, or set executor to 'torch'"
            )
        return session

    def run(self, session: onnxruntime.InferenceSession, bound: onnxruntime.IOBinding) -> None:
        """Compute; nobody waits for a CUDA device."""
        if self._stream is None:
            session.run_with_iobinding(bound)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        session.run_with_iobinding(bound, self._run_options)
        current.wait_stream(self._stream)

    def _compute_on_cuda(self) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ExecutorError(
                f"device = {str(self.device)!r}: the installed ONNX Runtime {onnxruntime.__version__} computes on CPUs "
                "alone; pip install onnxruntime-gpu in its place, or set device to 'cpu'"
            )
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._providers = [("CUDAExecutionProvider", cuda_options(self.device, self._stream.cuda_stream))]


def cuda_options(device: torch.device, stream: int) -> dict[str, str]:
    """Of the provider that computes on `device`, on PyTorch's `stream`."""
    return {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream),
        # Not the next power of two, for the KV cache has the rest: the largest step is rehearsed first.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # float32 is float32.
    }


class OnnxSegment:
    """One graph, whose inputs and outputs are tensors of the caller's.

    Parameters
    ----------
    session
        Of the file's graph; several segments with other weights may share one.
    weights
        What the graph takes as its weights, by name: none where it has them within.

    Raises
    ------
    SegmentError
        If the graph does not take and give what the file is said to, or if a weight is missing or of another shape.
    """

    def __init__(
        self,
        runtime: OnnxRuntime,
        session: onnxruntime.InferenceSession,
        file: SegmentFile,
        weights: Mapping[str, Tensor],
    ) -> None:
        self._runtime = runtime
        self._session = session
        self._segment = file.spec.segment
        self._inputs, self._outputs = file.spec.inputs, file.spec.outputs
        _check(file, "takes", session.get_inputs(), (*self._inputs, *file.weights))
        _check(file, "gives", session.get_outputs(), self._outputs)
        self._binding = session.io_binding()
        self._bound: dict[str, tuple[int, int]] = {}
        self._weights = [_weight(file, spec, weights) for spec in file.weights]  # Their addresses are what is bound.
        for spec, weight in zip(file.weights, self._weights, strict=True):
            self._bind(self._binding.bind_input, spec, weight)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs` from `inputs`, both in the order of the segment's, contiguous and on the device.

        Raises
        ------
        EngineError
            If a tensor is not what the contract says.
        """
        for spec, tensor in zip(self._inputs, inputs, strict=True):
            self._bind(self._binding.bind_input, spec, tensor)
        for spec, tensor in zip(self._outputs, outputs, strict=True):
            self._bind(self._binding.bind_output, spec, tensor)
        self._runtime.run(self._session, self._binding)

    def _bind(self, bind: Any, spec: TensorSpec, tensor: Tensor) -> None:
        """Give the graph the tensor's address, unless that is what it has: telling takes longer than looking."""
        place = tensor.data_ptr(), len(tensor)
        if self._bound.get(spec.name) == place:
            return
        device = self._runtime.device
        check_given(self._segment, spec, tensor, device)
        bind(spec.name, device.type, device.index or 0, _ELEMENTS[spec.dtype], tuple(tensor.shape), place[0])
        self._bound[spec.name] = place


def _weight(file: SegmentFile, spec: TensorSpec, weights: Mapping[str, Tensor]) -> Tensor:
    weight = weights.get(spec.name)
    if weight is None or weight.dtype is not spec.dtype or tuple(weight.shape) != spec.shape:
        seen = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise SegmentError(
            f"{file.path} takes {spec.name} as {spec.dtype} {list(spec.shape)}, and there is {seen}; "
            f"{again(file.path.parent)}"
        )
    return weight.contiguous()


def _check(file: SegmentFile, does: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    there = {node.name: (node.type, _fixed(node.shape)) for node in found}
    wanted = {spec.name: (_TYPES[spec.dtype], _fixed(spec.shape)) for spec in specs}
    for name in sorted(there.keys() | wanted.keys()):
        if (seen := there.get(name, "nothing")) != (expected := wanted.get(name, "nothing")):
            raise SegmentError(f"{file.path} {does} {name} as {seen} in place of {expected}; {again(file.path.parent)}")


def _fixed(shape: Sequence[int | str]) -> tuple[int | None, ...]:
    """The sizes that are the same at every step."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def again(directory: Path) -> str:
    """What to do about segments that cannot be used."""
    return f"remove {directory} to have the segments exported again"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_SHARING: Mapping[str, str] = {
    "session.use_env_allocators": "1",
    # A session's weights stay as long as it does: in the shared arena they would hold what lies between them.
    "session.use_device_allocator_for_initializers": "1",
    # Threads that spin hold the CPUs that other sessions' and PyTorch's need: with 2 of them on 2 busy CPUs a step of
    # one token took 39 ms so, 11 where they span within their own session alone, and 2.4 where they slept at once.
    "session.intra_op.allow_spinning": "0",
}

_sharing = Lock()
_shares = False


def _share_memory() -> None:
    """Have an arena for all sessions of this process that ask for a shared one."""
    global _shares
    with _sharing:
        if _shares:
            return
        memory = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        arena = onnxruntime.OrtArenaCfg(_NO_SIZE_LIMIT, _GROW_BY_POWERS_OF_TWO, _DEFAULT, _DEFAULT)
        try:
            onnxruntime.create_and_register_allocator(memory, arena)
        except Exception as error:  # Somebody else in this process has set up theirs, which then serves.
            _log.info("ONNX Runtime computes in memory that this process shares already: %s", _one_line(error))
        _shares = True
