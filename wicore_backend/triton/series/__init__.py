"""What Triton's /metrics page says of an engine: every series, with where its value is in the engine's statistics.

Nothing here imports Triton, so that it is tested without a server.
"""

from __future__ import annotations

from wicore_backend.triton.series import blocks, requests, steps, tiers
from wicore_backend.triton.series.family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (*steps.FAMILIES, *requests.FAMILIES, *blocks.FAMILIES, *tiers.FAMILIES)
