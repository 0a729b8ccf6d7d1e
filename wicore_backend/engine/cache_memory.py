"""What the caches get where no setting says how much. Without tensors: a card's plan can be drawn up anywhere."""

from __future__ import annotations

from wicore_backend.config import EngineConfig
from wicore_backend.hmt.pool import staging_bytes

_CPU_KV_CACHE_BYTES = 2**30
_CUDA_HOST_CACHE_BYTES = 4 * 2**30
_CPU_HOST_CACHE_BYTES = 2**28
_CUDA_IMAGE_CACHE_BYTES = 2**28
_CPU_IMAGE_CACHE_BYTES = 2**26


def kv_cache_bytes(settings: EngineConfig, *, free: int | None, needed: int) -> int:
    """Bytes of the KV cache on the device.

    Parameters
    ----------
    free
        Bytes that the CUDA device has free once weights are loaded; None on the CPU.
    needed
        Of these, what computing will take.
    """
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    if free is None:
        return _CPU_KV_CACHE_BYTES
    share = int(max(0, free - needed) * settings.hmt_gpu_threshold) - image_cache_bytes(settings, cuda=True)
    return share - staging_bytes(share) if host_cache_bytes(settings, cuda=True) else share


def host_cache_bytes(settings: EngineConfig, *, cuda: bool) -> int:
    """Bytes of the host tier."""
    if settings.host_cache_bytes is not None:
        return settings.host_cache_bytes
    if cuda:
        return _CUDA_HOST_CACHE_BYTES
    return 0 if settings.nvme_cache_path is None else _CPU_HOST_CACHE_BYTES


def image_cache_bytes(settings: EngineConfig, *, cuda: bool) -> int:
    """Bytes of the device that keep what became of pictures."""
    if settings.image_cache_bytes is not None:
        return settings.image_cache_bytes
    return _CUDA_IMAGE_CACHE_BYTES if cuda else _CPU_IMAGE_CACHE_BYTES
