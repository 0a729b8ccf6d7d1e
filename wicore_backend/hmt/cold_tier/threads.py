"""How the cold tier's threads compute."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch


def compute_alone() -> None:
    """Keep this thread's operators on this thread, whatever their size.

    Each thread that computes with several has a pool of OpenMP threads of its own, and the one that runs the model
    would find no core. What OpenMP is told here concerns the calling thread; `torch.set_num_threads` would concern
    others too.
    """
    torch.get_num_threads()  # Gives a new thread the process's number; later, that would undo the next line.
    with suppress(AttributeError):  # A torch without OpenMP.
        ctypes.CDLL(None).omp_set_num_threads(1)
