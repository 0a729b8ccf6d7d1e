"""The cards that there are ready-made settings for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.tensorrt.library import LibraryName

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of card.

    Attributes
    ----------
    memory_bytes
        What its driver reports, error correction on where it is on by default.
    compute_capability
        As TensorRT names it: `sm89`.
    library
        That builds and runs its engines: TensorRT-RTX, which comes as a package and builds on a machine without a GPU,
        or TensorRT, of NVIDIA's images.
    precisions
        That its engines can be in.
    processors, shared_bytes
        Multiprocessors, and what a program may have of the shared memory of one.
    """

    name: str
    memory_bytes: int
    compute_capability: str
    library: LibraryName
    precisions: frozenset[Precision]
    processors: int
    shared_bytes: int


_ADA = frozenset({Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT4, Precision.FP8})

CARDS: Mapping[str, Card] = {
    "t10": Card(
        "T10 16 GB",
        # Not seen: what a T4 reports, a card of the same generation and size.
        15_109 * _MIB,
        "sm75",
        LibraryName.TENSORRT_RTX,
        # Turing multiplies float16 and nothing else that TensorRT-RTX takes: no bfloat16, INT4, FP8, nor float32.
        frozenset({Precision.FP16}),
        processors=72,
        shared_bytes=65_536,
    ),
    "rtx4090": Card("RTX 4090 24 GB", 24_564 * _MIB, "sm89", LibraryName.TENSORRT_RTX, _ADA, 128, 101_376),
    "l20": Card("L20 48 GB", 46_068 * _MIB, "sm89", LibraryName.TENSORRT_RTX, _ADA, 92, 101_376),
    # TensorRT-RTX refuses SM90.
    "h100": Card("H100 80 GB", 81_559 * _MIB, "sm90", LibraryName.TENSORRT, _ADA, 132, 232_448),
}
