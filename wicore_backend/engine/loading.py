"""From settings and a checkpoint directory to a model that is ready to run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.config import EngineConfig
from wicore_backend.engine.assembly import device_needs, make_runner
from wicore_backend.engine.cache_memory import host_cache_bytes, image_cache_bytes, kv_cache_bytes
from wicore_backend.engine.executor_loading import LoadedExecutor, load_executor
from wicore_backend.engine.executors import choose, computing_type, find_engines
from wicore_backend.engine.runner import ModelRunner
from wicore_backend.engine.sampling_params import generation_defaults
from wicore_backend.engine.statistics import ExecutorInUse
from wicore_backend.engine.tiers import BlockMover, ColdStorage
from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.bounded_kv import KVBudget
from wicore_backend.hmt.budget import divide_host_memory, divide_memory
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import NameScheme
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.pool import KVPools, slot_bytes
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.observability.process_age import process_age_s
from wicore_backend.processor.processor import Processor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model on its device with its KV cache, and what the engine has to know of it."""

    runner: ModelRunner
    processor: Processor
    blocks: BlockManager
    mover: BlockMover
    pools: KVPools
    name_scheme: NameScheme
    max_model_len: int
    vocab_size: int
    soft_tokens_per_image: int
    """0 for a model without vision."""
    eos_token_ids: frozenset[int]
    generation_defaults: Mapping[str, Any]
    executor: ExecutorInUse
    overlaps: bool = False
    """The device computes while the host goes on."""


def load_model(settings: EngineConfig, woken: Callable[[], None]) -> LoadedModel:
    """Load the checkpoint, allocate the KV cache and wire the parts. On the thread that will run the model.

    Parameters
    ----------
    woken
        Called on any thread when blocks have moved between the tiers.

    Raises
    ------
    CheckpointError
        If the directory is not a usable Gemma-3 checkpoint.
    InvalidArgumentError
        If a setting contradicts the machine or the model.
    """
    began = time.monotonic()
    if not settings.model.is_dir():
        raise CheckpointError(f"model = {str(settings.model)!r} is not a directory; give that of a Gemma-3 checkpoint")
    device = _device(settings.device)
    if device.type == "cuda":
        # This thread's: kernels and events go to the current device, wherever their tensors are.
        torch.cuda.set_device(device.index or 0)
    config = Gemma3Config.from_checkpoint(settings.model)
    choice = choose(settings.executor, device, find=partial(find_engines, settings, config, device))
    _log.info("%s: the executor is %s: %s", settings.model.name, choice.name, choice.reason)
    dtype = computing_type(choice, settings, device)
    kv_dtype = _kv_dtype(settings, dtype)
    positions = config.text.max_position_embeddings
    max_model_len = settings.context(positions)
    image_tokens = config.mm_tokens_per_image if config.vision else 0
    if settings.max_batch_tokens < settings.max_running + image_tokens:
        raise InvalidArgumentError(
            f"max_batch_tokens = {settings.max_batch_tokens} must hold a token of each of max_running = "
            f"{settings.max_running} sequences and a whole image of {image_tokens} tokens"
        )
    processor = Processor.from_checkpoint(
        settings.model, limits=settings.prompt_limits(positions), do_pan_and_scan=settings.pan_and_scan
    )
    layout = KVLayout.of(
        config.text.layer_groups,
        block_size=settings.block_size,
        kv_heads=config.text.num_kv_heads,
        head_dim=config.text.head_dim,
        window=config.text.window,
        bytes_per_value=kv_dtype.itemsize,
    )
    needs = partial(device_needs, config, settings, layout, device=device, dtype=dtype, kv_dtype=kv_dtype)
    reading = time.monotonic()
    executor = load_executor(
        choice,
        settings,
        config,
        device=device,
        dtype=dtype,
        reserved_bytes=lambda: sum(needs().values()),
    )
    read = time.monotonic()
    budget = None
    if settings.kv_budget_tokens is not None:
        budget = KVBudget.of(settings.kv_budget_tokens, settings.block_size)
        _log.warning("kv_budget_tokens = %d: answers of longer sequences are lossy", settings.kv_budget_tokens)
    num_blocks = divide_memory(
        layout,
        memory_bytes=_cache_bytes(settings, device, partial(needs, loaded=executor)),
        max_sequences=settings.max_running,
        max_tokens=max_model_len,
        max_chunk=settings.max_batch_tokens,
    )
    host_slots = divide_host_memory(
        num_blocks,
        slot_bytes(layout, settings.host_cache_codec, kv_dtype),
        host_cache_bytes(settings, cuda=device.type == "cuda"),
    )
    pools = KVPools.allocate(
        layout, num_blocks, host_slots, device=device, dtype=kv_dtype, host_codec=settings.host_cache_codec
    )
    with ExitStack() as on_failure:
        on_failure.callback(pools.close)
        runner = make_runner(
            config,
            executor,
            pools,
            normalization=processor.normalization,
            max_model_len=max_model_len,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            graphs=settings.cuda_graphs,
            image_cache_bytes=image_cache_bytes(settings, cuda=device.type == "cuda"),
            sampling=MassSampling.of(layout) if pools.host or budget or device.type == "cuda" else None,
        )
        _log.info(
            "%s ready on %s in %s after %.1f s (weights %.1f s, KV cache and kernels %.1f s), %.1f s after the process "
            "began: context %d, KV in %s, its blocks %s, and in host memory %s",
            *(settings.model.name, device, dtype, time.monotonic() - began, read - reading, time.monotonic() - read),
            *(process_age_s(), max_model_len, kv_dtype),
            {str(group): num_blocks[group] for group in layout.groups},
            {str(group): host_slots[group] for group in layout.groups},
        )
        defaults = generation_defaults(settings.model)
        cold = _cold_storage(settings, layout, pools, _computed_in(executor), woken)
        if cold is not None:
            on_failure.callback(cold.close)
        lower = None
        if pools.host:
            host = HostTier(host_slots, POLICIES[settings.hmt_policy])
            lower = LowerTiers(
                host,
                None if cold is None else cold.tier,
                threshold=settings.hmt_cpu_threshold,
                burst=2 * layout.blocks_for(settings.max_batch_tokens),
            )
        blocks = BlockManager(
            layout,
            num_blocks,
            max_chunk=settings.max_batch_tokens,
            lower=lower,
            budget=budget,
            # Where nothing computes beside the host, what a policy takes would make steps longer.
            policy=POLICIES[settings.hmt_policy] if device.type == "cuda" else None,
        )
        loaded = LoadedModel(
            runner=runner,
            processor=processor,
            blocks=blocks,
            mover=BlockMover(blocks, pools, cold),
            pools=pools,
            name_scheme=NameScheme(settings.block_size),
            max_model_len=max_model_len,
            vocab_size=config.text.vocab_size,
            soft_tokens_per_image=image_tokens,
            eos_token_ids=frozenset(config.eos_token_ids),
            generation_defaults=defaults,
            executor=ExecutorInUse(str(choice.name), choice.reason),
            overlaps=device.type == "cuda",
        )
        on_failure.pop_all()  # From now on the mover closes both.
        return loaded


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(
            f"device = {name!r}: this machine has {torch.cuda.device_count()} usable CUDA devices; use 'cpu' or 'auto'"
        )
    return device


def _kv_dtype(settings: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """Of keys and values on the device, where `dtype` is what is computed in."""
    if settings.kv_cache_dtype == "auto":
        return dtype
    for setting, codec in (("host_cache_codec", settings.host_cache_codec), ("nvme_codec", settings.disk_codec)):
        if codec != "exact":
            raise InvalidArgumentError(
                f"{setting} = {codec!r}: with kv_cache_dtype = 'fp8' blocks are small already and kept as they are; "
                "set it to 'exact', or kv_cache_dtype to 'auto'"
            )
    return FP8


def _cold_storage(
    settings: EngineConfig, layout: KVLayout, pools: KVPools, computed_in: str, woken: Callable[[], None]
) -> ColdStorage | None:
    directory = settings.nvme_cache_path
    if directory is None:
        return None
    if pools.host.keys() != set(layout.groups):
        raise InvalidArgumentError(
            f"host_cache_bytes = {settings.host_cache_bytes}: nvme_cache_path needs host memory for blocks on their "
            "way to the disk and back; raise it, or leave it at its default"
        )
    if settings.host_cache_codec not in ("exact", settings.disk_codec):
        raise InvalidArgumentError(
            f"nvme_codec = {settings.disk_codec!r}: the disk takes blocks as host memory keeps them, and "
            f"host_cache_codec = {settings.host_cache_codec!r}; set both to the same, or host_cache_codec to 'exact'"
        )
    return ColdStorage(
        directory,
        capacity_bytes=settings.nvme_cache_bytes,
        codec=settings.disk_codec,
        layout=layout,
        pools=pools,
        policy=POLICIES[settings.hmt_policy],
        # The codec's own says what blocks are in, which need not be what they were computed in.
        fingerprint=checkpoint_fingerprint(settings.model) + computed_in.encode(),
        woken=woken,
        behind_bytes_per_second=settings.nvme_write_behind_bytes_per_second,
    )


def _computed_in(loaded: LoadedExecutor) -> str:
    """What tells a model's keys and values apart by how they were computed: rounded weights and rows give others."""
    return f"{loaded.executor.dtype} {loaded.multiplies}".rstrip()


def _cache_bytes(settings: EngineConfig, device: torch.device, needs: Callable[[], Mapping[str, int]]) -> int:
    """Bytes of the KV cache on the device, where the executor is loaded; `needs` is what else takes memory there."""
    if device.type != "cuda":
        return kv_cache_bytes(settings, free=None, needed=0)
    free, _ = torch.cuda.mem_get_info(device)
    needed = needs()
    in_mib = (f"{what} {size / 2**20:,.0f}" for what, size in needed.items())
    _log.info("%.0f MiB of %s are free; needed to compute, in MiB: %s", free / 2**20, device, ", ".join(in_mib))
    return kv_cache_bytes(settings, free=free, needed=sum(needed.values()))
