"""An executor and pools to a runner: the fastest attention that the device has, and graphs of what can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wicore_backend.attention.base import Attention
from wicore_backend.attention.gpu.needs import AttentionNeeds
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.config import EngineConfig
from wicore_backend.engine import device_memory
from wicore_backend.engine.device_memory import Widening
from wicore_backend.engine.executor_loading import LoadedExecutor
from wicore_backend.engine.pictures import PictureEncoder
from wicore_backend.engine.runner import DecodeReplay, LayersReplay, ModelRunner
from wicore_backend.executor.tensorrt.contexts import EXECUTION_CONTEXT_BYTES
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables
from wicore_backend.processor.images import PixelNormalization


def device_needs(
    config: Gemma3Config,
    settings: EngineConfig,
    layout: KVLayout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    loaded: LoadedExecutor | None = None,
) -> dict[str, int]:
    """Bytes that a model's runner takes of its CUDA device, beside weights and pools, by what they are for.

    Who asks before the executor is `loaded` is the executor, TensorRT's: it counts its activations itself, widens
    nothing and may turn out to be recordable.
    """
    if find_spec("triton") is None:
        return {}  # Nothing is recorded, and the share that the KV cache leaves has to do.
    from wicore_backend.attention.gpu import hopper
    from wicore_backend.attention.gpu.tiling import Tiling
    from wicore_backend.attention.gpu.tuning import tuning_for

    text = config.text
    tuning = tuning_for(text.head_dim, dtype, kv_dtype, device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiling = Tiling(layout, text.num_heads, tuning, processors)
    widens_keys = kv_dtype == FP8 and hopper.fits(tiling, kv_dtype, dtype, device)
    widening = Widening(
        matrix=0 if loaded is None else loaded.widened_matrix,
        head=0 if loaded is None else loaded.widened_head,
        keys=hopper.WIDENED_BYTES if widens_keys else 0,
    )
    max_model_len = settings.context(text.max_position_embeddings)
    return device_memory.device_needs(
        config,
        settings,
        AttentionNeeds(tiling, value_bytes=dtype.itemsize),
        widening,
        max_model_len=max_model_len,
        value_bytes=dtype.itemsize,
        own_activations=loaded is None or loaded.own_activations,
        recordable=loaded is None or loaded.executor.recordable,
        recorded_segment_bytes=EXECUTION_CONTEXT_BYTES if loaded is None else loaded.recorded_segment_bytes,
    )


class _Steps(NamedTuple):
    """What steps are computed by: attention, what replays some of them, and the vision tower."""

    attention: Attention[Any]
    replay: DecodeReplay | None
    layers: tuple[LayersReplay, ...]
    vision: Callable[[Tensor], Tensor]


def make_runner(
    config: Gemma3Config,
    loaded: LoadedExecutor,
    pools: KVPools,
    *,
    normalization: PixelNormalization,
    max_model_len: int,
    max_running: int,
    max_batch_tokens: int,
    graphs: bool,
    image_cache_bytes: int,
    sampling: MassSampling | None,
) -> ModelRunner:
    """A runner over `pools`, computing on the device and in the type of the executor.

    On a GPU with OpenAI Triton attention is by kernels of its own, and where the executor can be recorded, steps are as
    CUDA graphs, unless `graphs` is False: then they are rehearsed. Elsewhere attention is by PyTorch's.
    """
    executor = loaded.executor
    device, dtype = executor.device, executor.dtype
    rotary = RotaryTables(config, max_positions=max_model_len, device=device, dtype=dtype)
    if device.type == "cuda" and find_spec("triton") is not None:
        steps = _with_kernels(
            *(config, loaded, pools, rotary),
            max_keys=max_model_len,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            graphs=graphs,
            measures=sampling is not None,
        )
    else:
        steps = _Steps(TorchPagedAttention(pools, **_attention(config, dtype)), None, (), executor.vision)
    return ModelRunner(
        executor=executor,
        attention=steps.attention,
        rotary=rotary,
        pictures=PictureEncoder(
            steps.vision, normalization=normalization, device=device, dtype=dtype, cache_bytes=image_cache_bytes
        ),
        layout=pools.layout,
        sampling=sampling,
        arrive=pools.wait,
        replay=steps.replay,
        layers=steps.layers,
    )


def _attention(config: Gemma3Config, dtype: torch.dtype) -> dict[str, Any]:
    """What attention of any kind is told of the model."""
    text = config.text
    return {
        "scale": text.attention_scale,
        "window": text.window,
        "softcap": text.attn_logit_softcapping,
        "dtype": dtype,
    }


def _with_kernels(
    config: Gemma3Config,
    loaded: LoadedExecutor,
    pools: KVPools,
    rotary: RotaryTables,
    *,
    max_keys: int,
    max_running: int,
    max_batch_tokens: int,
    graphs: bool,
    measures: bool,
) -> _Steps:
    """On a GPU with OpenAI Triton, every kernel of a step compiled by now."""
    # Imported where they are used: OpenAI Triton takes a second, and has no business on a machine without a GPU.
    from wicore_backend.attention.gpu.paged import GpuPagedAttention
    from wicore_backend.engine.graphs import DecodeGraphs
    from wicore_backend.engine.prompts import PromptGraphs
    from wicore_backend.engine.recording import CudaRecorder
    from wicore_backend.engine.rehearsal import rehearse
    from wicore_backend.engine.segments import SegmentGraphs, token_counts
    from wicore_backend.engine.step_inputs import StepInputs
    from wicore_backend.engine.vision_graphs import VisionGraphs

    executor, text = loaded.executor, config.text

    def attention_over(pools: KVPools) -> GpuPagedAttention:
        return GpuPagedAttention(pools, query_heads=text.num_heads, **_attention(config, executor.dtype))

    attention = attention_over(pools)
    attention.rehearse()
    if not (graphs and executor.recordable):
        rehearse(*(executor, attention_over, pools, rotary), max_sequences=max_running, max_tokens=max_batch_tokens)
        loaded.prepared()
        return _Steps(attention, None, (), executor.vision)
    record = loaded.recording(CudaRecorder(executor.device))
    decodes = DecodeGraphs(
        executor=executor,
        attention=attention,
        rotary=rotary,
        layout=pools.layout,
        max_sequences=max_running,
        max_keys=max_keys,
        measures=measures,
        record=record,
    )
    # One for both, since a step is a prompt by itself or it is not.
    inputs = StepInputs.of(text, executor, tokens=token_counts(max_batch_tokens)[-1])
    prompts = PromptGraphs(
        executor=executor,
        attention=attention,
        rotary=rotary,
        layout=pools.layout,
        inputs=inputs,
        max_keys=max_keys,
        measures=measures,
        record=record,
    )
    segments = SegmentGraphs(
        executor=executor,
        attention=attention,
        rotary=rotary,
        layout=pools.layout,
        inputs=inputs,
        record=record,
    )
    for graphs_of in (decodes, prompts, segments):
        graphs_of.prepare()
    segments.rehearse(max_batch_tokens)
    vision: Callable[[Tensor], Tensor] = executor.vision
    if config.vision is not None:
        side = config.vision.image_size
        vision = tower = VisionGraphs(executor.vision, loaded.recording(CudaRecorder(executor.device)))
        tower.prepare(torch.zeros(3, side, side, dtype=executor.dtype, device=executor.device))
    loaded.prepared()
    return _Steps(attention, decodes, (prompts, segments), vision)
