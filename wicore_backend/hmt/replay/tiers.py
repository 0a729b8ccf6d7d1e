"""What tiers a replay has and what their work is worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.policy import POLICIES, Key, Policy
from wicore_backend.hmt.replay.furthest_next_use import FurthestNextUse

REFERENCE = "belady"
POLICY_NAMES = (*POLICIES, REFERENCE)


class TierName(StrEnum):
    """The engine's tiers, the warmest first."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A colder tier: its size in blocks, and how fast blocks come back from it, in GB/s."""

    name: TierName
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
        match = re.fullmatch(r"(host|nvme)=([1-9]\d{0,11})@(\d{1,6}(?:\.\d+)?)", text, re.ASCII)
        if match is None or float(match[3]) == 0:
            raise InvalidArgumentError(
                f"{text!r:.80} is not a tier; write host=BLOCKS@GBPS or nvme=BLOCKS@GBPS, as in host=20000@55"
            )
        return cls(TierName(match[1]), int(match[2]), float(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Sizes in blocks.

    Attributes
    ----------
    device
        What the device keeps between prompts, the longest unused leaving first, as the engine's does.
    host
        Ordered by the policy, like the disk.
    nvme
        0 for no disk.
    """

    device: int = 0
    host: int
    nvme: int = 0

    @classmethod
    def of(cls, capacity: int, colder: Sequence[TierSpec]) -> Tiers:
        """Of a warmest tier of `capacity` blocks, and colder ones.

        The warmest is the device's cache if there is host memory below it. Otherwise it is host memory, with a device
        that keeps nothing between prompts: the one tier, then, that the policy orders.

        Raises
        ------
        InvalidArgumentError
            If a tier is there twice.
        """
        blocks = {tier.name: tier.blocks for tier in colder}
        if len(blocks) != len(colder):
            raise InvalidArgumentError("the engine has each tier once; give host=... and nvme=... once each")
        if TierName.HOST in blocks:
            return cls(device=capacity, host=blocks[TierName.HOST], nvme=blocks.get(TierName.NVME, 0))
        return cls(host=capacity, nvme=blocks.get(TierName.NVME, 0))

    @property
    def blocks(self) -> Mapping[TierName, int]:
        """The tiers that there are, the warmest first."""
        sizes = {TierName.DEVICE: self.device, TierName.HOST: self.host, TierName.NVME: self.nvme}
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What a hit saves and moving a block costs.

    Attributes
    ----------
    prefill_tokens_per_second
        Rate at which prompts are computed. Default: Gemma-3-27B in bf16 on one H200.
    block_tokens
        Tokens of a block of the trace.
    block_bytes
        Bytes of one block. Default: 512 tokens of Gemma-3-27B's global layers in bf16, 80 KiB a token.
    host_gigabytes_per_second, nvme_gigabytes_per_second
        At which blocks come up from there. Defaults: as measured on a machine with an H200.
    """

    prefill_tokens_per_second: float = 12_500.0
    block_tokens: int = 512
    block_bytes: int = 512 * 80 * 1024
    host_gigabytes_per_second: float = 55.0
    nvme_gigabytes_per_second: float = 3.1

    def prefill_seconds(self, tokens: int) -> float:
        """What it takes to compute so many tokens."""
        return tokens / self.prefill_tokens_per_second

    def load_seconds(self, blocks: int) -> float:
        """What it takes to bring so many blocks from host memory to the device."""
        return blocks * self.block_bytes / (self.host_gigabytes_per_second * 1e9)

    def restore_seconds(self, blocks: int) -> float:
        """What it takes to bring so many blocks from disk to host memory."""
        return blocks * self.block_bytes / (self.nvme_gigabytes_per_second * 1e9)

    def seconds_saved(self, hit_tokens: int, loaded: Mapping[TierName, int]) -> float:
        """Prefill time that hits saved, less the time that it took to bring `loaded` blocks up."""
        moving = self.load_seconds(loaded.get(TierName.HOST, 0)) + self.restore_seconds(loaded.get(TierName.NVME, 0))
        return self.prefill_seconds(hit_tokens) - moving


def make_policy(name: str, capacity: int, prompts: Sequence[Sequence[Key]]) -> Policy:
    """The policy of that name for a tier of `capacity` blocks; `belady` is told what `prompts` come."""
    return FurthestNextUse(capacity, prompts) if name == REFERENCE else POLICIES[name](capacity)
