"""Wicore: Gemma-3, text and images, served from NVIDIA Triton or from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wicore_backend.config import EngineConfig
    from wicore_backend.engine.engine import Engine
    from wicore_backend.engine.sampling_params import SamplingParams

__all__ = ["Engine", "EngineConfig", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the processor's process does not import torch for the engine that it does not run.
    if name == "Engine":
        from wicore_backend.engine.engine import Engine

        return Engine
    if name == "EngineConfig":
        from wicore_backend.config import EngineConfig

        return EngineConfig
    if name == "SamplingParams":
        from wicore_backend.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
