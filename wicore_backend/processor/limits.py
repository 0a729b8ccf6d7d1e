"""What a request may ask of the processor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wicore_backend.settings import Settings

Positive = Annotated[int, Field(ge=1)]


class PromptLimits(Settings):
    """Bounds of one prompt. Each is checked before the work that it bounds is done."""

    max_image_bytes: Positive = 20 * 2**20
    """Size of one encoded image file."""

    max_image_pixels: Positive = 64_000_000
    """Width times height of one image, as its header has it: a decompression bomb is refused undecoded."""

    max_images: Annotated[int, Field(ge=0)] = 16
    """Images of one prompt; pan-and-scan crops do not count."""

    max_prompt_tokens: Positive = 131_072
    """Tokens of one prompt, soft tokens of images included; an engine sets it from its context length."""


DEFAULT_LIMITS = PromptLimits()
