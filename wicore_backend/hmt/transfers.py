"""Copies of blocks that the books ask for. `KVPools.apply` makes them.

1. The books list transfers in the order in which they decide them. They are made in that order, on the stream on which
   the steps run, before any kernel of the next step. So a block or a slot may change its owner in the books at once:
   whatever reads its old bytes was listed before whatever writes new ones.
2. A block that is being loaded is active, and can be found under its name at once: whoever finds it reads it in the
   next step at the earliest.
3. A sequence that is cancelled gives its blocks back like any other; its transfers are still made, and harm nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from wicore_backend.hmt.layout import LayerGroup


class Route(Enum):
    """From where to where."""

    WITHIN_DEVICE = auto()
    DEVICE_TO_HOST = auto()
    HOST_TO_DEVICE = auto()


@dataclass(frozen=True, slots=True)
class Transfer:
    """One block's bytes, from a device block or a host slot to another, of the same group."""

    route: Route
    group: LayerGroup
    source: int
    target: int
