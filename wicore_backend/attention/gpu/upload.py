"""Small arrays that go to the device together, in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from wicore_backend.attention.gpu.schedule import Ints

_ALIGNMENT = 4  # int32, so that a record of four or eight is read at once


class Upload:
    """Device memory for named int32 arrays, of which each `put` writes the contents.

    Parameters
    ----------
    sizes
        The most values of each array. What comes last is copied only as far as it is filled, so the largest should.
    """

    def __init__(self, sizes: Mapping[Hashable, int], device: torch.device) -> None:
        self._at: dict[Hashable, int] = {}
        end = 0
        for name, size in sizes.items():
            self._at[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._sizes = sizes
        self._buffer = torch.empty(end, dtype=torch.int32, device=device)

    def __getitem__(self, name: Hashable) -> Tensor:
        """The array's memory [its size], whose address never changes."""
        return self._buffer[self._at[name] : self._at[name] + self._sizes[name]]

    def put(self, arrays: Mapping[Hashable, Ints]) -> None:
        """Copy `arrays`, flattened, on the current stream, after what uses their predecessors there.

        Raises
        ------
        ValueError
            If one is larger than its size.
        """
        for name, array in arrays.items():
            if array.size > self._sizes[name]:
                raise ValueError(f"{name} has {array.size} values, and there is room for {self._sizes[name]}")
        end = max(self._at[name] + array.size for name, array in arrays.items())
        # PyTorch keeps page-locked memory that a copy still reads from being handed out again.
        staging = torch.empty(end, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        host = staging.numpy()
        for name, array in arrays.items():
            host[self._at[name] : self._at[name] + array.size] = array.reshape(-1)
        self._buffer[:end].copy_(staging, non_blocking=True)


def put(arrays: Mapping[Hashable, Ints], device: torch.device) -> Upload:
    """The arrays in memory of their own."""
    upload = Upload({name: array.size for name, array in arrays.items()}, device)
    upload.put(arrays)
    return upload
