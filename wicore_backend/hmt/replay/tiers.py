"""What tiers are made of and what their work is worth, in a replay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.policy import POLICIES, Policy
from wicore_backend.hmt.replay.furthest_next_use import FurthestNextUse
from wicore_backend.hmt.replay.trace import TraceRequest

REFERENCE = "belady"
POLICY_NAMES = (*POLICIES, REFERENCE)


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier's name, its size in blocks, and how fast blocks come back from it, in GB/s."""

    name: str
    blocks: int
    gigabytes_per_second: float

    @classmethod
    def parse(cls, text: str) -> TierSpec:
        """A tier written NAME=BLOCKS@GBPS, such as host=20000@55.

        Raises
        ------
        InvalidArgumentError
            If it is not, or a size or speed is not positive.
        """
        match = re.fullmatch(r"([a-z][a-z0-9_]*)=([1-9]\d{0,11})@(\d{1,6}(?:\.\d+)?)", text, re.ASCII)
        if match is None or float(match[3]) == 0:
            raise InvalidArgumentError(f"{text!r:.80} is not a tier; write NAME=BLOCKS@GBPS, as in host=20000@55")
        return cls(match[1], int(match[2]), float(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What a hit saves and a restore costs.

    Attributes
    ----------
    prefill_tokens_per_second
        Rate at which prompts are computed. Default: Gemma-3-27B in bf16 on one H200.
    block_bytes
        Bytes of one block. Default: 512 tokens of Gemma-3-27B's global layers in bf16, 80 KiB a token.
    """

    prefill_tokens_per_second: float = 12_500.0
    block_bytes: int = 512 * 80 * 1024

    def seconds_saved(self, hit_tokens: int, restored: Sequence[int], tiers: Sequence[TierSpec]) -> float:
        """Prefill time that hits saved, less the time that restores from `tiers`, the colder ones, took."""
        restoring = sum(
            blocks * self.block_bytes / (tier.gigabytes_per_second * 1e9)
            for blocks, tier in zip(restored, tiers, strict=True)
        )
        return hit_tokens / self.prefill_tokens_per_second - restoring


def make_policy(name: str, capacity: int, requests: Sequence[TraceRequest]) -> Policy:
    """The policy of that name for a tier of `capacity` blocks; `belady` is told what `requests` come."""
    return FurthestNextUse(capacity, requests) if name == REFERENCE else POLICIES[name](capacity)
