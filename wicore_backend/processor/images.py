"""Pictures to the pixels the vision tower reads, as the checkpoint's preprocessor_config.json says."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wicore_backend.errors import CheckpointError
from wicore_backend.processor.checkpoint_files import read_json_if_present

Channels = tuple[float, float, float]
Positive = Annotated[int, Field(ge=1)]

DIGEST_BYTES = 16


class ImageConfig(BaseModel):
    """The part of preprocessor_config.json that decides about pixels; the file's other keys are about other code.

    Where a key is absent or null, transformers' own default for Gemma-3 holds; `size` must be there.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    size: Positive
    """Height and width of what the vision tower reads."""
    resample: Annotated[int, Field(ge=0, le=5)] = int(Image.Resampling.BILINEAR)
    """Pillow's number of the filter."""
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = (0.5, 0.5, 0.5)
    image_std: Channels = (0.5, 0.5, 0.5)
    do_pan_and_scan: bool = False
    pan_and_scan_min_crop_size: Positive = 256
    pan_and_scan_max_num_crops: Positive = 4
    pan_and_scan_min_ratio_to_activate: Annotated[float, Field(gt=0)] = 1.2

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("do_resize") is False:
            raise ValueError("do_resize is false, but the vision tower reads one size only")
        return {key: value for key, value in values.items() if value is not None}

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, size: Any) -> Any:
        if not isinstance(size, dict):
            return size
        if size.keys() != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"size is {size}; Gemma-3 takes a square, height and width")
        return size["height"]

    @field_validator("image_mean", "image_std", mode="before")
    @classmethod
    def _per_channel(cls, value: Any) -> Any:
        return (value, value, value) if isinstance(value, int | float) else value

    @field_validator("image_std")
    @classmethod
    def _not_zero(cls, std: Channels) -> Channels:
        if 0 in std:
            raise ValueError("a channel's std is 0")
        return std

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self | None:
        """The checkpoint's settings, None if it has none because the model reads text only.

        transformers 5 nests them as `image_processor` in processor_config.json, which goes before the older file.
        """
        nested = read_json_if_present(directory / "processor_config.json").get("image_processor")
        values = nested if nested is not None else read_json_if_present(directory / "preprocessor_config.json")
        if not values:
            return None
        if not isinstance(values, dict):
            raise CheckpointError(f"{directory}/processor_config.json: image_processor is no JSON object")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors(include_url=False)
            )
            raise CheckpointError(f"the image settings of {directory} cannot be used: {problems}") from None


@dataclass(frozen=True, slots=True)
class PixelNormalization:
    """From bytes to what the vision tower computes with: (pixel * rescale_factor - mean) / std, channel by channel."""

    rescale_factor: float = 1 / 255
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)

    @classmethod
    def from_config(cls, config: ImageConfig) -> Self:
        return cls(
            rescale_factor=config.rescale_factor if config.do_rescale else 1.0,
            mean=config.image_mean if config.do_normalize else (0.0, 0.0, 0.0),
            std=config.image_std if config.do_normalize else (1.0, 1.0, 1.0),
        )

    def table(self) -> NDArray[np.float32]:
        """float32 [3, 256]: what each byte of each channel becomes, rounded where transformers rounds."""
        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.mean, dtype=np.float32)[:, None]
        std = np.array(self.std, dtype=np.float32)[:, None]
        table: NDArray[np.float32] = (rescaled - mean) / std
        return table

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, 3, S, S] from uint8 [N, 3, S, S]."""
        return np.stack([channel[pixels[:, index]] for index, channel in enumerate(self.table())], axis=1)


def pan_and_scan(image: Image.Image, config: ImageConfig) -> list[Image.Image]:
    """Crops that show a long picture's parts larger, in reading order; none for one that is nearly square or small.

    As `Gemma3ImageProcessor.pan_and_scan` of transformers: along the longer side, as many crops as make them roughly
    square, between 2 and `pan_and_scan_max_num_crops`.
    """
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if long / short < config.pan_and_scan_min_ratio_to_activate:
        return []
    count = min(math.floor(long / short + 0.5), long // config.pan_and_scan_min_crop_size)
    count = min(max(2, count), config.pan_and_scan_max_num_crops)
    columns, rows = (count, 1) if width >= height else (1, count)
    crop_width, crop_height = math.ceil(width / columns), math.ceil(height / rows)
    if min(crop_width, crop_height) < config.pan_and_scan_min_crop_size:
        return []
    corners = product(range(0, height, crop_height), range(0, width, crop_width))
    return [
        image.crop((left, top, min(left + crop_width, width), min(top + crop_height, height))) for top, left in corners
    ]


def resize(image: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    """uint8 [3, S, S] of an RGB picture of any size."""
    resized = image.resize((config.size, config.size), resample=config.resample)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """The name of what was seen: 16 bytes of BLAKE2b over the resized pixels, uint8 [3, S, S]."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=DIGEST_BYTES).digest()
