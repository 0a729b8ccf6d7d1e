"""The card that engines run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch


class Card(Protocol):
    """A device, as far as engines depend on it.

    Attributes
    ----------
    name
        "NVIDIA GeForce RTX 4090"
    compute_capability
        "sm89"
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> str: ...

    def free_bytes(self) -> int:
        """Of its memory, now."""

    def stream(self) -> int:
        """PyTorch's current stream, as TensorRT takes it."""

    def side_stream(self) -> int:
        """A stream that could be recorded, as the default one cannot."""

    def settle(self) -> None:
        """Wait until it has computed all that it was given."""


@dataclass(frozen=True, slots=True)
class CudaCard:
    """`Card` by CUDA."""

    device: torch.device
    name: str
    compute_capability: str

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """A CUDA device, that is there."""
        major, minor = torch.cuda.get_device_capability(device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, torch.cuda.get_device_name(device), f"sm{major}{minor}")

    def leave_default_stream(self) -> None:
        """Make another stream this thread's current one: on the default one TensorRT waits at each execution."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        torch.cuda.set_stream(stream)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def side_stream(self) -> int:
        return int(torch.cuda.Stream(self.device).cuda_stream)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)
