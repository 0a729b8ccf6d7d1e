"""Kernels in CUDA C++ for Hopper: the instructions that they are written in, and what compiles and launches them."""

from pathlib import Path

INSTRUCTIONS = Path(__file__).parent / "hopper.cuh"
"""The header that all of them include."""
ARCHITECTURE = "sm_90a"
SHARED_BYTES = 227 * 1024
"""What a block may have of a multiprocessor's shared memory."""
