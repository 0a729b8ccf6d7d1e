"""Weights and pools to a runner: the fastest executor and attention that the device has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from wicore_backend.attention.gpu.needs import AttentionNeeds
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.config import EngineConfig
from wicore_backend.engine import device_memory
from wicore_backend.engine.device_memory import Widening
from wicore_backend.engine.pictures import PictureEncoder
from wicore_backend.engine.runner import DecodeReplay, LayersReplay, ModelRunner
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables
from wicore_backend.models.gemma3.weights import Gemma3Weights
from wicore_backend.processor.images import PixelNormalization

_log = logging.getLogger(__name__)


def device_needs(
    config: Gemma3Config, weights: Gemma3Weights, settings: EngineConfig, layout: KVLayout, *, kv_dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that a model's runner takes of its CUDA device, beside weights and pools, by what they are for."""
    if find_spec("triton") is None:
        return {}  # Nothing is recorded, and the share that the KV cache leaves has to do.
    from wicore_backend.attention.gpu import hopper
    from wicore_backend.attention.gpu.paged import tuning_for
    from wicore_backend.executor.matrix import widened_bytes

    text, embedding = config.text, weights.text.embedding
    device, dtype = embedding.device, embedding.dtype
    tuning = tuning_for(text.head_dim, dtype, kv_dtype, device)
    attention = AttentionNeeds(
        layout,
        query_heads=text.num_heads,
        value_bytes=dtype.itemsize,
        tuning=tuning,
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
    )
    rows, keys = attention.tile_tokens * attention.group_rows, tuning.prefill.keys
    on_hopper = tuning.prefill.hopper_stages is not None and hopper.fits(
        layout, kv_dtype, dtype, device, rows=rows, keys=keys
    )
    matrices = (m for layer in weights.text.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down))
    widening = Widening(
        matrix=max(map(widened_bytes, matrices)),
        head=widened_bytes(weights.text.head),
        keys=hopper.WIDENED_BYTES if on_hopper and kv_dtype == FP8 else 0,
    )
    max_model_len = settings.context(text.max_position_embeddings)
    needs = {"max_model_len": max_model_len, "value_bytes": dtype.itemsize}
    return device_memory.device_needs(config, settings, attention, widening, **needs)


def make_runner(
    config: Gemma3Config,
    weights: Gemma3Weights,
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
    """A runner over `pools`, computing on the device and in the type of `weights`.

    On a GPU with OpenAI Triton it computes by kernels of its own, of which it records CUDA graphs here unless `graphs`
    is False; elsewhere by PyTorch's.
    """
    text, embedding = config.text, weights.text.embedding
    device, dtype = embedding.device, embedding.dtype
    pictures = partial(
        PictureEncoder, normalization=normalization, device=device, dtype=dtype, cache_bytes=image_cache_bytes
    )
    rotary = RotaryTables(config, max_positions=max_model_len, device=embedding.device, dtype=embedding.dtype)
    if embedding.is_cuda and find_spec("triton") is None:
        _log.warning(
            "no OpenAI Triton (pip install triton): computing by PyTorch's own kernels, at a fraction of speed"
        )
    elif embedding.is_cuda:
        # Imported where they are used: OpenAI Triton takes a second, and has no business on a machine without a GPU.
        from wicore_backend.attention.gpu.paged import GpuPagedAttention
        from wicore_backend.engine.graphs import DecodeGraphs
        from wicore_backend.engine.prompts import PromptGraphs
        from wicore_backend.engine.recording import CudaRecorder
        from wicore_backend.engine.segments import SegmentGraphs, token_counts
        from wicore_backend.engine.step_inputs import StepInputs
        from wicore_backend.engine.vision_graphs import VisionGraphs
        from wicore_backend.executor.cuda_executor import CudaExecutor

        executor = CudaExecutor(config, weights)
        attention = GpuPagedAttention(
            pools,
            query_heads=text.num_heads,
            scale=text.attention_scale,
            window=text.window,
            softcap=text.attn_logit_softcapping,
            dtype=embedding.dtype,
        )
        replay: DecodeReplay | None = None
        layers: tuple[LayersReplay, ...] = ()
        vision: Callable[[Tensor], Tensor] = executor.vision
        if graphs:
            record = CudaRecorder(embedding.device)
            decodes = DecodeGraphs(
                executor=executor,
                attention=attention,
                rotary=rotary,
                layout=pools.layout,
                max_sequences=max_running,
                max_keys=max_model_len,
                measures=sampling is not None,
                record=record,
            )
            # One for both, since a step is a prompt by itself or it is not.
            longest = token_counts(max_batch_tokens)[-1]
            inputs = StepInputs.of(text, executor, tokens=longest)
            prompts = PromptGraphs(
                executor=executor,
                attention=attention,
                rotary=rotary,
                layout=pools.layout,
                inputs=inputs,
                max_keys=max_model_len,
                measures=sampling is not None,
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
            replay, layers = decodes, (prompts, segments)
            if config.vision is not None:
                side = config.vision.image_size
                vision = tower = VisionGraphs(executor.vision, CudaRecorder(device))
                tower.prepare(torch.zeros(3, side, side, dtype=dtype, device=device))
        return ModelRunner(
            executor=executor,
            attention=attention,
            rotary=rotary,
            pictures=pictures(vision),
            layout=pools.layout,
            sampling=sampling,
            arrive=pools.wait,
            replay=replay,
            layers=layers,
        )
    plain = TorchExecutor(config, weights)
    return ModelRunner(
        executor=plain,
        attention=TorchPagedAttention(
            pools,
            scale=text.attention_scale,
            window=text.window,
            softcap=text.attn_logit_softcapping,
            dtype=embedding.dtype,
        ),
        rotary=rotary,
        pictures=pictures(plain.vision),
        layout=pools.layout,
        sampling=sampling,
        arrive=pools.wait,
    )
