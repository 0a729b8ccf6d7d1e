"""Replacement policies: which block of a tier leaves first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wicore_backend.hmt.policy.a2cr import A2CR
from wicore_backend.hmt.policy.a2cr_formula import ProductA2CR, WeightedA2CR
from wicore_backend.hmt.policy.arc import ARC
from wicore_backend.hmt.policy.base import Access, Key, Policy
from wicore_backend.hmt.policy.lfu import LFU
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.policy.s3fifo import S3FIFO
from wicore_backend.hmt.policy.w_tinylfu import WTinyLFU

POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {
        "a2cr": A2CR,
        "a2cr_product": ProductA2CR,
        "a2cr_weighted": WeightedA2CR,
        "lru": LRU,
        "lfu": LFU,
        "arc": ARC,
        "s3fifo": S3FIFO,
        "w_tinylfu": WTinyLFU,
    }
)
"""Every policy by the name that settings and the replay tool know it by."""

__all__ = ["POLICIES", "Access", "Key", "Policy"]
