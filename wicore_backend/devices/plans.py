"""Ready-made settings: a model on a card, in the precision that fits it.

An engine runs on one device, so a plan for two cards is two engines, each with a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wicore_backend.config import EngineConfig
from wicore_backend.devices.cards import CARDS, Card
from wicore_backend.devices.memory import CardMemory
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.models.gemma3.config import Gemma3Config

_DISK: Mapping[str, Any] = {"nvme_cache_path": Path("/var/cache/wicore/kv"), "nvme_cache_bytes": 200 * 10**9}
_FP8_KV: Mapping[str, Any] = {"kv_cache_dtype": "fp8"}
_HOST_TABLE: Mapping[str, Any] = {"host_embeddings": True}
_WHOLE_CARD: Mapping[str, Any] = {"hmt_gpu_threshold": 0.95}
"""Nothing else is on the card: no desktop, no other process."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on a card.

    Attributes
    ----------
    model
        The published model that it was drawn up for.
    settings
        Of the engine, by name, where they differ from the defaults.
    cards
        Engines of it that a machine of this kind runs, one a card.
    """

    name: str
    card: Card
    model: str
    precision: Precision
    settings: Mapping[str, Any]
    cards: int = 1

    def engine_config(self, model: Path) -> EngineConfig:
        """The engine's settings for the checkpoint in `model`."""
        return EngineConfig(model=model, **self.serving_settings)

    @property
    def serving_settings(self) -> Mapping[str, Any]:
        """`settings`, with those that take the engines of this plan."""
        return {"executor": "tensorrt", "engine_precision": str(self.precision), **self.settings}

    def memory(self, config: Gemma3Config, model: Path) -> CardMemory:
        """What the checkpoint in `model`, whose configuration is `config`, takes of the card."""
        return CardMemory.of(
            config,
            self.engine_config(model),
            self.precision,
            card=self.card,
        )


def _host(gigabytes: int) -> Mapping[str, Any]:
    return {"host_cache_bytes": gigabytes * 2**30}


def _by_name(plans: Iterable[Plan]) -> Mapping[str, Plan]:
    return {plan.name: plan for plan in plans}


PLANS: Mapping[str, Plan] = _by_name(
    (
        Plan(
            "t10x2-4b",
            CARDS["t10"],
            "gemma-3-4b",
            Precision.FP16,
            {"dtype": "float16", "max_model_len": 65_536, "max_running": 8, **_host(8), **_DISK},
            cards=2,
        ),
        Plan(
            "rtx4090-27b",
            CARDS["rtx4090"],
            "gemma-3-27b",
            Precision.INT4,
            {"max_model_len": 98_304, "max_running": 8, **_FP8_KV, **_WHOLE_CARD, **_HOST_TABLE, **_host(16), **_DISK},
        ),
        Plan(
            "rtx4090-12b",
            CARDS["rtx4090"],
            "gemma-3-12b",
            Precision.FP8,
            {"max_running": 16, **_FP8_KV, **_HOST_TABLE, **_host(16), **_DISK},
        ),
        Plan(
            "rtx4090-4b",
            CARDS["rtx4090"],
            "gemma-3-4b",
            Precision.BF16,
            {"max_running": 32, **_host(16), **_DISK},
        ),
        Plan(
            "l20-27b",
            CARDS["l20"],
            "gemma-3-27b",
            Precision.INT4,
            {"max_running": 16, **_FP8_KV, **_HOST_TABLE, **_host(32), **_DISK},
        ),
        Plan(
            "l20-27b-fp8",
            CARDS["l20"],
            "gemma-3-27b",
            Precision.FP8,
            {"max_running": 16, **_FP8_KV, **_HOST_TABLE, **_host(32), **_DISK},
        ),
        Plan(
            "l20-12b",
            CARDS["l20"],
            "gemma-3-12b",
            Precision.BF16,
            {"max_running": 16, **_host(32), **_DISK},
        ),
        Plan(
            "h100-27b",
            CARDS["h100"],
            "gemma-3-27b",
            Precision.BF16,
            {"max_running": 32, "max_batch_tokens": 1024, **_host(64), **_DISK},
        ),
        Plan(
            "h100-27b-fp8",
            CARDS["h100"],
            "gemma-3-27b",
            Precision.FP8,
            {"max_running": 64, "max_batch_tokens": 1024, **_FP8_KV, **_host(64), **_DISK},
        ),
        Plan(
            "h100-12b",
            CARDS["h100"],
            "gemma-3-12b",
            Precision.BF16,
            {"max_running": 64, "max_batch_tokens": 1024, **_host(64), **_DISK},
        ),
    )
)
"""Each serves the model's whole context, but for those whose settings have a `max_model_len`."""
