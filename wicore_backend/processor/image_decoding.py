"""Image files from outside to RGB pictures: everything here is hostile until proven otherwise."""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.limits import PromptLimits

ImageSource: TypeAlias = bytes | str | Image.Image | NDArray[np.uint8]
"""An encoded file as bytes, base64 of one as text or bytes, a `data:` URL, a picture, or uint8 [H, W, 3]."""

FORMATS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = {
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    "WebP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
}
"""How a file of each format begins, and Pillow's reader of it.

The readers are called directly, because Image.open warns of large images or refuses them before their size can be
read and compared with the limit.
"""

TAKEN = "PNG, JPEG, WebP and GIF are taken"

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation (Exif 2.32, tag 0x0112; 1 is upright)."""


def load_rgb(source: ImageSource, *, name: str, limits: PromptLimits) -> Image.Image:
    """The picture as its viewer would see it: first frame, upright, RGB, transparency over white.

    Parameters
    ----------
    source
        What the client sent.
    name
        What errors call it.
    limits
        `max_image_bytes` holds for the encoded file, `max_image_pixels` for the header's width times height.

    Raises
    ------
    InvalidArgumentError
        It is over a limit, damaged, or no image.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source, name=name)
    if isinstance(source, str | bytes):
        source = _open(_file_bytes(source, name=name, limits=limits), name=name, limits=limits)
    if not isinstance(source, Image.Image):
        raise InvalidArgumentError(
            f"{name} is a {type(source).__name__}; give the file's bytes, base64 text, a PIL image or uint8 [H, W, 3]"
        )
    _check_size(source, name=name, limits=limits)
    try:
        source.load()
        return to_rgb(upright(source), name=name)
    except InvalidArgumentError:
        raise
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        kind = getattr(source, "format", None) or "image"
        raise InvalidArgumentError(f"{name} is a damaged or truncated {kind} file: {error}") from None


def read_image_file(path: Path, *, limits: PromptLimits) -> bytes:
    """The bytes of an image file on this machine, for the Python interface: no request from outside gets here."""
    try:
        size = path.stat().st_size
        if size > limits.max_image_bytes:
            raise InvalidArgumentError(_too_many_bytes(str(path), size, limits))
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"image {path} cannot be read: {error.strerror}") from None


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation asks; a damaged EXIF block asks for nothing.

    transformers' image processor does not do this (its `load_image` does), so that a phone's portrait lies on its
    side there when it is given as an opened file.
    """
    try:
        orientation = image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # the EXIF parser, too, raises almost anything, and the pixels are good without it
        return image
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """The picture in RGB, transparency composited over white, as transformers' `convert_to_rgb` has it.

    One difference: 16-bit grey keeps its high byte, where Pillow's conversion would clip all above 255 to white.
    """
    if image.mode in ("I", "F"):
        raise InvalidArgumentError(f"{name} has mode {image.mode}, which has no defined range; convert it to L or RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_array(array: NDArray[np.uint8], *, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InvalidArgumentError(f"{name} is an array {array.dtype} {list(array.shape)}; it takes uint8 [H, W, 3]")
    return Image.fromarray(array)


def _file_bytes(source: str | bytes, *, name: str, limits: PromptLimits) -> bytes:
    """The encoded file, out of its base64 or data URL if it came in one."""
    if len(source) == 0:
        raise InvalidArgumentError(f"{name} is empty; {TAKEN}")
    if isinstance(source, str) or not _format(source):
        source = _from_base64(source, name=name, limits=limits)
    if len(source) > limits.max_image_bytes:
        raise InvalidArgumentError(_too_many_bytes(name, len(source), limits))
    return source


def _from_base64(source: str | bytes, *, name: str, limits: PromptLimits) -> bytes:
    try:
        text = source.encode("ascii") if isinstance(source, str) else source
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{name} is a text that is not base64, starting {source[:24]!r}; {TAKEN}") from None
    if len(text) * 3 // 4 > 2 * limits.max_image_bytes:  # leaves room for line breaks, which do not count
        raise InvalidArgumentError(_too_many_bytes(name, len(text) * 3 // 4, limits))
    body = text
    if text[:5].lower() == b"data:":
        header, comma, body = text.partition(b",")
        if not comma or not header.lower().endswith(b";base64"):
            raise InvalidArgumentError(f"{name} is a data URL without ';base64,'; send the file in base64")
    try:
        data = base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        raise InvalidArgumentError(
            f"{name} is neither an image file nor base64 of one, starting {text[:24]!r}; {TAKEN}"
        ) from None
    if not data:
        raise InvalidArgumentError(f"{name} is empty; {TAKEN}")
    return data


def _open(data: bytes, *, name: str, limits: PromptLimits) -> Image.Image:
    kind = _format(data)
    if kind is None:
        raise InvalidArgumentError(f"{name} is not an image file, starting {data[:16]!r}; {TAKEN}")
    reader = FORMATS[kind][1]
    try:
        return reader(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise InvalidArgumentError(
            f"{name}: {error}; the limit is {limits.max_image_pixels} (max_image_pixels)"
        ) from None
    except Exception as error:  # on damaged data Pillow's parsers raise almost anything
        raise InvalidArgumentError(f"{name} is a damaged or truncated {kind} file: {error}") from None


def _format(data: bytes) -> str | None:
    return next((kind for kind, (magic, _) in FORMATS.items() if magic.match(data)), None)


def _check_size(image: Image.Image, *, name: str, limits: PromptLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidArgumentError(f"{name} has no pixels: {width} x {height}")
    if width * height > limits.max_image_pixels:
        raise InvalidArgumentError(
            f"{name} has {width * height} pixels ({width} x {height}), over the limit of {limits.max_image_pixels} "
            "(max_image_pixels); send a smaller picture"
        )


def _too_many_bytes(name: str, size: int, limits: PromptLimits) -> str:
    return (
        f"{name} has {size} bytes, over the limit of {limits.max_image_bytes} (max_image_bytes); "
        "send it smaller or compressed more"
    )
