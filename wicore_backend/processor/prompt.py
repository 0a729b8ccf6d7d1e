"""What the processor hands to the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """One image (or one pan-and-scan crop) of a prompt.

    Attributes
    ----------
    start
        Index in the prompt's token ids of the image's first soft token.
    length
        How many soft tokens it takes there; the engine never splits them.
    pixels
        uint8 [3, S, S], resized, not yet rescaled: `PixelNormalization` makes the float form.
    digest
        16 bytes that name what was seen, so that a prefix hash covers the picture and not just its placeholder ids.
    """

    start: int
    length: int
    pixels: NDArray[np.uint8]
    digest: bytes

    @property
    def end(self) -> int:
        """Index one past the image's last soft token."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids int32 [T] with every image already expanded to its soft tokens, and the images in order of `start`."""

    token_ids: NDArray[np.int32]
    images: tuple[PromptImage, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)
