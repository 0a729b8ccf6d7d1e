"""The ranges of sizes that engines are built for: steps of decodes, and steps with prompts in them.

TensorRT picks kernels for a profile's usual size and promises its range. Each number of tokens is in one profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wicore_backend.executor.segments.contract import IMAGES, ROWS, TOKENS, SegmentKind, SegmentSpec, TensorSpec

RECORDED_TOKENS = 1024
"""Steps of no more tokens are recorded as CUDA graphs, for a few sizes (`engine/segments.py`); those of a longer step
are as they come."""
GUESSED_TOKENS = 64
"""A step may guess so many tokens beside those that are due (`EngineConfig.max_guessed_tokens`)."""
MAX_IMAGES = 2
"""Pictures in one execution, as many as the engine encodes at once (`engine/pictures.py`): more take the vision tower's
activations from the KV cache, and are hardly quicker."""


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Sizes from `min` to `max`; `opt` is the one that kernels are chosen for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        assert 1 <= self.min <= self.opt <= self.max, self

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of one kind of step.

    Attributes
    ----------
    tokens, rows, images
        Of T, R and N in `contract.py`.
    """

    name: str
    tokens: Range
    rows: Range
    images: Range

    def range(self, letter: str) -> Range:
        """Of a size that is `TOKENS`, `ROWS` or `IMAGES`."""
        return {TOKENS: self.tokens, ROWS: self.rows, IMAGES: self.images}[letter]

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least, usual and largest shape of a tensor."""
        ranges = [self.range(size) if isinstance(size, str) else Range(size, size, size) for size in spec.shape]
        return tuple(r.min for r in ranges), tuple(r.opt for r in ranges), tuple(r.max for r in ranges)


def profiles_for(*, max_running: int, max_batch_tokens: int, max_images: int = MAX_IMAGES) -> tuple[Profile, ...]:
    """For an engine of these settings: steps of decodes, of up to 1,024 tokens, and longer ones, as far as there are.

    Each number of tokens from 1 to `max_batch_tokens` is in exactly one of them.
    """
    most_rows = min(max_batch_tokens, max_running + GUESSED_TOKENS)
    rows = Range(1, min(max_running, most_rows), most_rows)
    images = Range(1, 1, max_images)
    profiles: list[Profile] = []
    # Matrices are read once for any number of decodes, up to some 16 of them; and a long step is mostly full.
    for name, last in (
        ("decode", min(max_running, max_batch_tokens)),
        ("prompts", min(RECORDED_TOKENS, max_batch_tokens)),
        ("long", max_batch_tokens),
    ):
        first = profiles[-1].tokens.max + 1 if profiles else 1
        if first <= last:
            usual = min(last, 16) if name == "decode" else last
            profiles.append(Profile(name, Range(first, usual, last), rows, images))
    return tuple(profiles)


def profiles_of(spec: SegmentSpec, profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Those of `profiles` that the engine of a segment is built with: the tower sees no tokens, and has but one."""
    return tuple(profiles[:1]) if spec.segment.kind is SegmentKind.VISION else tuple(profiles)
