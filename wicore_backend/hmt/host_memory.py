"""Host memory for KV blocks."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from wicore_backend.errors import InvalidArgumentError

_REACHABLE_FROM_KERNELS = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostMemory:
    """Zeroed bytes from the system, which gives them page by page as they are used first; page-locked on demand.

    PyTorch's own page-locked memory comes in powers of two: 5 GiB took 8.1, measured.

    Attributes
    ----------
    tensor
        uint8 [size].

    Raises
    ------
    InvalidArgumentError
        If the system does not give or lock so much.
    """

    def __init__(self, size: int, *, locked: bool) -> None:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise InvalidArgumentError(
                f"{size:,} bytes of host memory cannot be had ({error}); lower host_cache_bytes"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._locked = False
        if locked:
            code = int(_cudart().cudaHostRegister(self.tensor.data_ptr(), size, _REACHABLE_FROM_KERNELS))
            if code:
                raise InvalidArgumentError(
                    f"{size:,} bytes of host memory cannot be page-locked (CUDA error {code}); lower "
                    "host_cache_bytes, or give the process more memory"
                )
            self._locked = True

    def close(self) -> None:
        """Unlock the memory, which no copy may be using any more; what it holds can still be read."""
        if self._locked:
            self._locked = False
            _cudart().cudaHostUnregister(self.tensor.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
