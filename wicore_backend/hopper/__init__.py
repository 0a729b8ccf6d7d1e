"""Kernels in CUDA C++ for Hopper: the instructions that they are written in, the
ring that they copy into, and what compiles and launches them."""

from pathlib import Path

HEADERS = tuple(Path(__file__).parent / name for name in ("hopper.cuh", "ring.cuh"))
"""What all of them include."""
ARCHITECTURE = "sm_90a"
SHARED_BYTES = 227 * 1024
"""What a block may have of a multiprocessor's shared memory."""
