"""From a checkpoint, exported graphs or engines to an executor on its device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import assert_never

import torch
from torch import Tensor

from wicore_backend.config import EngineConfig
from wicore_backend.engine.executors import Choice, ExecutorName, exported_precision
from wicore_backend.engine.pictures import MAX_BATCH
from wicore_backend.engine.recording import Record
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.base import Executor
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision, Segment, segments
from wicore_backend.executor.tensorrt.store import EngineSet
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import CheckpointReader, load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weight_format import weight_format
from wicore_backend.models.gemma3.weights import Gemma3Weights
from wicore_backend.observability.progress import ByteProgress
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import Int4Matrix

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedExecutor:
    """An executor, and what has to be known of it besides.

    Attributes
    ----------
    multiplies
        How, where keys and values come out otherwise than by the checkpoint's weights and rows in `executor.dtype`.
    widened_matrix, widened_head
        Device memory that it takes for a moment to widen a part of a layer's matrix, or of the head.
    own_activations
        Whether it took the memory that it computes in when it was loaded.
    recorded_segment_bytes
        Device memory that it takes for each segment of a recording.
    recording
        What its work is recorded by, made of a recorder.
    prepared
        To be called when all that is recorded and rehearsed has been.
    """

    executor: Executor
    multiplies: str = ""
    widened_matrix: int = 0
    widened_head: int = 0
    own_activations: bool = False
    recorded_segment_bytes: int = 0
    recording: Callable[[Record], Record] = lambda record: record
    prepared: Callable[[], None] = lambda: None


def load_executor(
    choice: Choice,
    settings: EngineConfig,
    config: Gemma3Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reserved_bytes: Callable[[], int],
) -> LoadedExecutor:
    """The executor of the choice, with the weights that it computes with and no others.

    Parameters
    ----------
    dtype
        What it computes in: `computing_type`.
    reserved_bytes
        Device memory that others will have, the KV cache aside: an executor that can leave weights in host memory
        then does.

    Raises
    ------
    CheckpointError, SegmentError, ExecutorError
        If what it is made of is missing, broken, or another model's.
    """
    if settings.int4_prefill_dtype == "fp8" and (choice.name is not ExecutorName.TORCH or device.type != "cuda"):
        _log.warning(
            "int4_prefill_dtype = 'fp8' is for the executor torch on CUDA, not for %s on %s", choice.name, device
        )
    match choice.name:
        case ExecutorName.TORCH:
            return _torch(settings, config, device, dtype)
        case ExecutorName.ONNX:
            return _onnx(settings, config, device)
        case ExecutorName.TENSORRT:
            assert choice.engines is not None
            return _tensorrt(choice.engines, settings, config, device, reserved_bytes())
    assert_never(choice.name)


def _torch(settings: EngineConfig, config: Gemma3Config, device: torch.device, dtype: torch.dtype) -> LoadedExecutor:
    if settings.host_embeddings:
        _log.warning(
            "host_embeddings is for the executors tensorrt and onnx: this one multiplies by the embeddings, too"
        )
    if settings.engine_precision != "auto":
        _log.warning(
            "engine_precision = %r is for the executors tensorrt and onnx: this one computes in %s, by weights as they "
            "are in the checkpoint",
            *(settings.engine_precision, dtype),
        )
    weights = _weights(settings, config, device, dtype)
    if device.type == "cuda" and find_spec("triton") is not None:
        return _by_kernels(settings, config, weights)
    if device.type == "cuda":
        _log.warning(
            "no OpenAI Triton (pip install triton): computing by PyTorch's own kernels, at a fraction of speed"
        )
    return LoadedExecutor(TorchExecutor(config, weights))


def _by_kernels(settings: EngineConfig, config: Gemma3Config, weights: Gemma3Weights) -> LoadedExecutor:
    # Imported where they are used: OpenAI Triton takes a second, and has no business on a machine without a GPU.
    from wicore_backend.executor.cuda_executor import CudaExecutor
    from wicore_backend.executor.int4_matrix import multiplies_in_fp8
    from wicore_backend.executor.kernels.int4 import MAX_ROWS
    from wicore_backend.executor.matrix import widened_bytes

    matrices = [m for layer in weights.text.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    fp8_prefill = settings.int4_prefill_dtype == "fp8"
    if fp8_prefill and not any(isinstance(m, Int4Matrix) and multiplies_in_fp8(m) for m in matrices):
        _log.warning(
            "int4_prefill_dtype = 'fp8' is for INT4 weights in bfloat16 on cards from Ada on: %s has none here, and is "
            "multiplied in %s",
            *(settings.model.name, weights.text.embedding.dtype),
        )
        fp8_prefill = False
    # Fewer rows are multiplied as they are, which engines do not do.
    narrow = ["fp8 beyond one row"] if any(isinstance(m, Fp8Matrix) for m in matrices) else []
    narrow += [f"int4 in fp8 beyond {MAX_ROWS} rows"] if fp8_prefill else []
    return LoadedExecutor(
        CudaExecutor(config, weights, fp8_prefill=fp8_prefill),
        multiplies=", ".join(narrow),
        widened_matrix=max(widened_bytes(matrix, fp8_prefill=fp8_prefill) for matrix in matrices),
        widened_head=widened_bytes(weights.text.head),
    )


def _onnx(settings: EngineConfig, config: Gemma3Config, device: torch.device) -> LoadedExecutor:
    # Imported where they are used: onnx and onnxruntime are packages that need not be there.
    from wicore_backend.engine.exporting import exported_segments
    from wicore_backend.executor.onnx_executor import OnnxExecutor
    from wicore_backend.executor.onnx_session import OnnxRuntime

    precision = exported_precision(settings, device)
    runtime = OnnxRuntime(device, threads=settings.threads or torch.get_num_threads())
    # On a CPU, ONNX Runtime lays matrices that are within a graph out anew, as it multiplies them fastest. On a GPU it
    # does not, and weights that are inputs need no second copy of the model on the disk.
    within = (
        device.type == "cpu"
        or precision in (Precision.INT4, Precision.FP8)
        or weight_format(settings.model) is not None  # Those that are quantised cannot be inputs.
    )
    exported = exported_segments(settings, precision, weights="embedded" if within else "inputs")
    embedding, given = _given(settings, config, device, precision, whole=exported.weights == "inputs")
    executor = OnnxExecutor(config, exported, embedding, runtime, weights=given)
    if device.type == "cuda":
        # Before the KV cache takes what is free.
        with torch.inference_mode():
            executor.rehearse(tokens=settings.max_batch_tokens, pictures=MAX_BATCH)
    multiplies = _graphs_multiply(precision, searched=exported.searched)
    return LoadedExecutor(executor, multiplies, own_activations=True)


def _tensorrt(
    engines: EngineSet, settings: EngineConfig, config: Gemma3Config, device: torch.device, reserved_bytes: int
) -> LoadedExecutor:
    # Imported where there is a card.
    from wicore_backend.executor.tensorrt.card import CudaCard
    from wicore_backend.executor.tensorrt.contexts import EXECUTION_CONTEXT_BYTES
    from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
    from wicore_backend.executor.tensorrt.library import load_library

    key, card = engines.key, CudaCard.of(device)
    card.leave_default_stream()
    embedding, given = _given(settings, config, device, key.precision, whole=key.weights == "inputs")
    executor = TensorRTExecutor.load(
        config,
        engines,
        library=load_library(key.library.value),
        card=card,
        embed=embedding,
        weights=given,
        reserved_bytes=reserved_bytes,
        kv_cache_bytes=settings.kv_cache_bytes,
        graphs=settings.cuda_graphs,
    )
    return LoadedExecutor(
        executor,
        _graphs_multiply(key.precision, searched=key.searched),
        own_activations=True,
        recorded_segment_bytes=EXECUTION_CONTEXT_BYTES,
        recording=executor.recording,
        prepared=executor.save_kernels,
    )


def _graphs_multiply(precision: Precision, *, searched: bool) -> str:
    """`LoadedExecutor.multiplies` of exported graphs, and of engines that were built of them."""
    if precision is Precision.INT4:
        return "int4, scales searched" if searched else "int4, scales not searched"
    return "fp8" if precision is Precision.FP8 else ""


def _given(
    settings: EngineConfig, config: Gemma3Config, device: torch.device, precision: Precision, *, whole: bool
) -> tuple[Embedding, Mapping[Segment, Mapping[str, Tensor]]]:
    """What segments in `precision` have not within: embeddings and, of a `whole` model, the weights of each segment."""
    if settings.host_embeddings and device.type == "cuda" and find_spec("triton") is None:
        raise ExecutorError(
            "host_embeddings = true: a kernel in OpenAI Triton reads them from host memory, and it is not installed; "
            "pip install 'wicore[gpu]', or set host_embeddings to false"
        )
    dtype = precision.activations
    given: dict[Segment, Mapping[str, Tensor]] = {}
    if whole:
        from wicore_backend.executor.segments.export import bindings  # As above.

        weights = _weights(settings, config, device, dtype)
        table = weights.text.embedding
        given = {segment: bindings(config, weights, segment, precision) for segment in segments(config)}
    else:
        where = torch.device("cpu") if settings.host_embeddings else device
        with CheckpointReader(settings.model, config, device=where, dtype=dtype) as reader:
            table = reader.embedding()
    if settings.host_embeddings and device.type == "cuda":
        table = table.cpu().pin_memory()
    return Embedding(table, device=device, residual=precision.residual), given


def _weights(settings: EngineConfig, config: Gemma3Config, device: torch.device, dtype: torch.dtype) -> Gemma3Weights:
    with ByteProgress(f"{settings.model.name}: reading weights", _log) as progress:
        return load_weights(settings.model, config, device=device, dtype=dtype, progress=progress)
