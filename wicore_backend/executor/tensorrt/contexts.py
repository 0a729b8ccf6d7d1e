"""A segment's engine and what executes it: contexts, and what is bound to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from wicore_backend.errors import EngineError
from wicore_backend.executor.segments.contract import SegmentSpec
from wicore_backend.executor.segments.given import check_given
from wicore_backend.executor.tensorrt.card import Card
from wicore_backend.executor.tensorrt.library import Messages
from wicore_backend.executor.tensorrt.profiles import Profile

ALIGNMENT = 256
"""Of addresses in the device's memory that TensorRT takes."""

EXECUTION_CONTEXT_BYTES = 2**16
"""Of the device's memory that a context keeps to itself, beside the activations that all share: what some kernels keep
between executions, which no call tells. A guess: no card has been asked yet."""


class NewContext(Protocol):
    """Makes an `IExecutionContext` for a profile, which has its memory."""

    def __call__(self, profile: int, *, of_one_size: bool) -> Any:
        """`of_one_size` says that it is for a graph, and will see steps of one size only."""


@dataclass(slots=True, eq=False)
class _Bound:
    """A context and what it was told last, which is not told again."""

    context: Any
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class SegmentContexts:
    """Executes one segment.

    It has a context for each profile, so that no step waits for one to change its profile. A CUDA graph keeps the
    contexts that it was recorded with to itself: what they were told must stay as it was then. All use one memory for
    their activations, since one executes at a time.

    Parameters
    ----------
    weights
        Of a segment whose weights are inputs, by name.
    """

    def __init__(
        self,
        spec: SegmentSpec,
        *,
        profiles: Sequence[Profile],
        weights: Mapping[str, Tensor],
        new_context: NewContext,
        card: Card,
        messages: Messages,
    ) -> None:
        self._spec = spec
        self._name = spec.segment.name
        self._letter = spec.inputs[0].shape[0]
        assert isinstance(self._letter, str), "a segment's first input has a row for each token or picture"
        self._profiles = tuple(profiles)
        self._ranges = [profile.range(self._letter) for profile in profiles]
        self._weights = {name: _aligned(tensor) for name, tensor in weights.items()}
        self._new_context = new_context
        self._card = card
        self._messages = messages
        self._shared: dict[int, _Bound] = {}
        self._bound = self._shared
        self._own: list[_Bound] = []

    @property
    def most(self) -> int:
        """Tokens, or pictures, that it takes at once."""
        return max(sizes.max for sizes in self._ranges)

    def open(self) -> None:
        """Make the contexts that steps share."""
        for profile in range(len(self._ranges)):
            self._shared[profile] = self._fresh(profile)

    def keep_own(self) -> Callable[[], None]:
        """Use contexts that nobody used before, until the result is called. They live as long as all this."""
        self._bound = {}

        def restore() -> None:
            self._bound = self._shared

        return restore

    def capturable(self) -> bool:
        """Whether a CUDA graph can have what it does in steps of the usual sizes, as far as the library can tell."""
        stream = self._card.side_stream()
        for place, bound in self._shared.items():
            for spec in self._spec.inputs:
                self._shape(bound, spec.name, self._profiles[place].shapes(spec)[1])
        contexts = [bound.context for bound in self._shared.values()]
        return all(one.is_stream_capturable(stream) for one in contexts if hasattr(one, "is_stream_capturable"))

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs` of `inputs`, both in the order of the contract, on the current stream.

        Raises
        ------
        EngineError
            If a tensor is not what the contract says, or TensorRT refuses: names the segment, and what the library
            said.
        """
        size = len(inputs[0])
        profile = next((place for place, sizes in enumerate(self._ranges) if size in sizes), None)
        if profile is None:
            raise EngineError(f"{self._name}: {self._letter} = {size} is in none of its engine's profiles")
        bound = self._bound.get(profile)
        if bound is None:
            bound = self._bound[profile] = self._fresh(profile)
        # Copies are held until all is on the stream, or one would be made where another one was.
        readable = [_aligned(tensor) for tensor in inputs]
        for spec, tensor in zip(self._spec.inputs, readable, strict=True):
            check_given(self._spec.segment, spec, tensor, self._card.device)
            self._shape(bound, spec.name, tuple(tensor.shape))
            self._bind(bound, spec.name, tensor)
        for spec, tensor in zip(self._spec.outputs, outputs, strict=True):
            check_given(self._spec.segment, spec, tensor, self._card.device)
            self._bind(bound, spec.name, tensor)
        if not bound.context.execute_async_v3(self._card.stream()):
            raise EngineError(f"TensorRT could not execute {self._name} for {size} rows: {self._messages.errors()}")

    def _fresh(self, profile: int) -> _Bound:
        own = self._bound is not self._shared
        bound = _Bound(self._new_context(profile, of_one_size=own))
        if own:
            self._own.append(bound)
        for name, tensor in self._weights.items():
            self._bind(bound, name, tensor)
        return bound

    def _shape(self, bound: _Bound, name: str, shape: tuple[int, ...]) -> None:
        if bound.shapes.get(name) == shape:
            return
        if not bound.context.set_input_shape(name, shape):
            raise EngineError(f"TensorRT does not take {shape} for {name} of {self._name}: {self._messages.errors()}")
        bound.shapes[name] = shape

    def _bind(self, bound: _Bound, name: str, tensor: Tensor) -> None:
        address = tensor.data_ptr()
        if bound.addresses.get(name) == address:
            return
        if not bound.context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT does not take memory for {name} of {self._name}: {self._messages.errors()}")
        bound.addresses[name] = address


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where TensorRT can read it: rows one after the other, from a round address."""
    if tensor.is_contiguous() and (tensor.device.type == "cpu" or tensor.data_ptr() % ALIGNMENT == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
