"""Images from outside: what is taken, what is refused and in which words; nothing brings the processor down."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.processor_fixtures import copied_directory, edit_json, encoded, gemma_directory, picture
from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.processor.images import ImageConfig, PixelNormalization, pan_and_scan
from wicore_backend.processor.limits import PromptLimits
from wicore_backend.processor.processor import Processor

PROCESSOR = Processor.from_checkpoint(gemma_directory())
PNG = encoded(picture())
MEBIBYTE = 2**20


def pixels_of(image: Any, processor: Processor = PROCESSOR) -> np.ndarray[Any, Any]:
    prompt = processor.process("Describe this picture.", images=[image])
    assert len(prompt.images) == 1
    return prompt.images[0].pixels


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and brings next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def gif_header(width: int, height: int, *, frame: tuple[int, int] | None = None) -> bytes:
    """A GIF whose screen, and whose first frame, claim a size."""
    frame_width, frame_height = frame or (width, height)
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + b"\0\0\0\xff\xff\xff,"
        + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    data = bytearray(encoded(picture(), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width: int, height: int) -> bytes:
    """A WebP file whose extended header claims a canvas."""
    data = bytearray(encoded(picture(mode="RGBA"), "WEBP"))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


# What is taken.


def test_the_same_picture_by_every_road() -> None:
    text = base64.b64encode(PNG).decode()
    array = np.asarray(picture().convert("RGB"))
    roads: list[Any] = [
        PNG,
        text,
        text.encode(),
        "\n".join(text[start : start + 76] for start in range(0, len(text), 76)),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=x;BASE64,{text}".encode(),
        picture(),
        array,
    ]
    for road in roads:
        assert np.array_equal(pixels_of(road), pixels_of(PNG))
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:;base64,{text}"}}]}
    assert np.array_equal(PROCESSOR.process([message]).images[0].pixels, pixels_of(PNG))


def test_an_image_file_by_its_path_only_through_its_own_method(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    assert np.array_equal(pixels_of(PROCESSOR.read_image(path)), pixels_of(PNG))
    for refused in (path, str(path)):
        with pytest.raises(InvalidArgumentError, match=r"images\[0\]"):
            PROCESSOR.process("x", images=[refused])  # type: ignore[list-item]
    with pytest.raises(InvalidArgumentError, match=r"nothing\.png cannot be read"):
        PROCESSOR.read_image(tmp_path / "nothing.png")
    small = Processor.from_checkpoint(gemma_directory(), limits=PromptLimits(max_image_bytes=100))
    with pytest.raises(InvalidArgumentError, match=rf"{len(PNG)} bytes, over the limit of 100"):
        small.read_image(path)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [picture(seed=seed).quantize(32).convert("RGB") for seed in range(3)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(pixels_of(animated), pixels_of(frames[0]))


def test_pixels_are_channels_first_and_a_whole_image_keeps_its_colour() -> None:
    pixels = pixels_of(encoded(Image.new("RGB", (896, 896), (255, 0, 10))))
    assert pixels.shape == (3, 96, 96)
    assert pixels.dtype == np.uint8
    assert [np.unique(channel).tolist() for channel in pixels] == [[255], [0], [10]]


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (pixels_of(encoded(clear)) == 255).all()
    half = pixels_of(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))))
    assert half[:, 0, 0].tolist() == [255, 127, 127]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40):
        plain, damaged = encoded(picture(), "JPEG"), encoded(picture(), "JPEG", exif=exif)
        assert plain != damaged
        assert np.array_equal(pixels_of(damaged), pixels_of(plain))


def test_an_unknown_exif_orientation_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(pixels_of(encoded(picture(), exif=exif.tobytes())), pixels_of(PNG))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (3, 65_000), (9000, 2)])
def test_extreme_shapes(width: int, height: int) -> None:
    for do_pan_and_scan in (False, True):
        processor = Processor.from_checkpoint(gemma_directory(), do_pan_and_scan=do_pan_and_scan)
        assert pixels_of(encoded(Image.new("L", (width, height), 80)), processor).shape == (3, 96, 96)


def test_digest_names_the_pixels() -> None:
    first, again, other = (
        PROCESSOR.process("x", images=[image]).images[0] for image in (PNG, picture(), picture(seed=1))
    )
    assert first.digest == again.digest == hashlib.blake2b(first.pixels.tobytes(), digest_size=16).digest()
    assert first.digest != other.digest


def test_normalization_channel_by_channel() -> None:
    normalization = PixelNormalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    mean, std = (np.array(values)[:, None, None] for values in (normalization.mean, normalization.std))
    normalized = normalization.apply(pixels)
    assert normalized.dtype == np.float32
    assert normalized.shape == pixels.shape
    assert np.abs(normalized - (pixels / 255 - mean) / std).max() < 1e-6
    assert normalization.apply(pixels[:0]).shape == (0, 3, 5, 5)


def test_crops_cover_a_long_picture_in_reading_order() -> None:
    config = ImageConfig(size=96, do_pan_and_scan=True, pan_and_scan_min_crop_size=10)
    for width, height in ((101, 30), (30, 101)):
        image = picture(width, height)
        crops = [np.asarray(crop) for crop in pan_and_scan(image.convert("RGB"), config)]
        assert len(crops) == 3
        joined = np.concatenate(crops, axis=1 if width > height else 0)
        assert np.array_equal(joined, np.asarray(image.convert("RGB")))


# What is refused.

REFUSED: dict[str, tuple[Any, str]] = {
    "empty file": (b"", r"images\[0\] is empty"),
    "empty text": ("", r"images\[0\] is empty"),
    "text file called .png": (b"Hello, this is not a picture.\n" * 10, r"neither an image file nor base64.*b'Hello"),
    "text that is not ASCII": ("图片", "not base64"),
    "text file in another alphabet": ("图片".encode() * 20, "neither an image file nor base64"),
    "base64 of a text": (base64.b64encode(b"Hello, world").decode(), r"not an image file, starting b'Hello, world'"),
    "base64 of nothing": ("data:image/png;base64,", "is empty"),
    "base64 that breaks off": (base64.b64encode(PNG).decode()[:-3], "nor base64"),
    "base64 with a foreign character": ("iVBO*" + base64.b64encode(PNG).decode(), "nor base64"),
    "data URL without base64": ("data:image/png,%89PNG", "without ';base64,'"),
    "data URL without data": ("data:image/png", "without ';base64,'"),
    "address in the network": ("https://example.com/picture.png", "nor base64"),
    "path of a local file": ("/etc/passwd", "not an image file|nor base64"),
    "bitmap": (encoded(picture(), "BMP"), "PNG, JPEG, WebP and GIF are taken"),
    "TIFF": (encoded(picture(), "TIFF"), "PNG, JPEG, WebP and GIF are taken"),
    "PDF": (b"%PDF-1.4 stream", "PNG, JPEG, WebP and GIF are taken"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG, WebP and GIF are taken"),
    "zero bytes": (b"\0" * 100, "PNG, JPEG, WebP and GIF are taken"),
    "only the magic of PNG": (PNG[:8], "damaged or truncated PNG"),
    "only the magic of JPEG": (b"\xff\xd8\xff\xe0", "damaged or truncated JPEG"),
    "only the magic of WebP": (b"RIFF\x10\0\0\0WEBP", "damaged or truncated WebP"),
    "only the magic of GIF": (b"GIF89a", "damaged or truncated GIF"),
    "truncated PNG": (PNG[: len(PNG) // 2], "damaged or truncated PNG"),
    "truncated JPEG": (encoded(picture(), "JPEG")[:-300], "damaged or truncated JPEG"),
    "truncated WebP": (encoded(picture(), "WEBP")[:-200], "damaged or truncated WebP"),
    "truncated GIF": (encoded(picture(), "GIF")[:-300], "damaged or truncated GIF"),
    "PNG that brings too little": (png_header(500, 500), "damaged or truncated PNG"),
    "PNG bomb": (png_header(60_000, 60_000), r"3600000000 pixels \(60000 x 60000\), over the limit of 64000000"),
    "PNG just over the limit": (png_header(8001, 8000), r"64008000 pixels.*\(max_image_pixels\)"),
    "PNG without width": (png_header(0, 10), "no pixels|damaged"),
    "JPEG bomb": (jpeg_header(65_000, 65_000), "4225000000 pixels"),
    "JPEG without height": (jpeg_header(10, 0), "no pixels|damaged"),
    "GIF bomb": (gif_header(65_000, 65_000), "pixels.*64000000"),
    "GIF whose frame is a bomb": (gif_header(10, 10, frame=(65_000, 65_000)), "pixels.*64000000"),
    "GIF without size": (gif_header(0, 0), "no pixels|damaged"),
    "WebP bomb": (webp_header(16_000, 16_000), "pixels.*64000000|damaged"),
    "array of floats": (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\].*uint8 \[H, W, 3\]"),
    "array of four channels": (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
    "array of one row": (np.zeros(12, np.uint8), r"uint8 \[12\]"),
    "array without pixels": (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    "picture of floats": (Image.new("F", (4, 4)), "mode F, which has no defined range"),
    "picture of integers": (Image.new("I", (4, 4)), "mode I, which has no defined range"),
    "picture without pixels": (Image.new("RGB", (0, 4)), "no pixels: 0 x 4"),
    "number": (5, "is a int"),
    "nothing": (None, "is a NoneType"),
    "list of bytes": ([137, 80], "is a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_usable_image_is_refused_in_words(name: str) -> None:
    image, words = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        PROCESSOR.process("x", images=[image])
    assert str(caught.value).startswith("images[0]")
    assert len(str(caught.value)) < 300


def test_the_bad_image_of_several_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^images\[2\] is empty"):
        PROCESSOR.process("x", images=[PNG, PNG, b""])


def test_file_size_limit_holds_for_bytes_and_for_base64() -> None:
    limit = len(PNG) - 1
    processor = Processor.from_checkpoint(gemma_directory(), limits=PromptLimits(max_image_bytes=limit))
    for source in (PNG, base64.b64encode(PNG).decode(), base64.b64encode(PNG * 10)):
        with pytest.raises(InvalidArgumentError, match=rf"bytes, over the limit of {limit} \(max_image_bytes\)"):
            processor.process("x", images=[source])
    exact = Processor.from_checkpoint(gemma_directory(), limits=PromptLimits(max_image_bytes=len(PNG)))
    assert pixels_of(base64.b64encode(PNG).decode(), exact).shape == (3, 96, 96)


def test_pixel_limit_is_exact() -> None:
    processor = Processor.from_checkpoint(gemma_directory(), limits=PromptLimits(max_image_pixels=2400))
    assert pixels_of(encoded(picture(60, 40)), processor).shape == (3, 96, 96)
    with pytest.raises(InvalidArgumentError, match=r"2401 pixels \(2401 x 1\), over the limit of 2400"):
        processor.process("x", images=[encoded(picture(2401, 1))])
    with pytest.raises(InvalidArgumentError, match=r"2401 pixels \(7 x 343\)"):
        processor.process("x", images=[np.zeros((343, 7, 3), np.uint8)])


def test_giant_text_chunks_in_a_png_do_no_harm() -> None:
    long, bomb = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    long.add_text("comment", "a" * 8 * MEBIBYTE)
    assert np.array_equal(pixels_of(encoded(picture(), pnginfo=long)), pixels_of(PNG))
    bomb.add_text("comment", "a" * 80 * MEBIBYTE, zip=True)
    with pytest.raises(InvalidArgumentError, match=r"^images\[0\] is a damaged or truncated PNG file"):
        PROCESSOR.process("x", images=[encoded(picture(), pnginfo=bomb)])


def is_refused(data: bytes) -> bool:
    try:
        PROCESSOR.process("x", images=[data])
    except InvalidArgumentError as error:
        return str(error).startswith("images[0]")
    return False


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_random_damage_is_either_survived_or_named(kind: str) -> None:
    """Nothing but a prompt or an InvalidArgumentError comes out, whatever bytes go in."""
    rng = random.Random(kind)
    whole = encoded(picture(40, 30), kind)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8, 40])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        start = rng.randrange(len(data))
        if rng.random() < 0.3:
            del data[start : start + rng.randrange(1, 60)]
        refused += is_refused(bytes(data))
    assert refused > 10


# Image settings of checkpoints.


def test_a_checkpoint_without_image_settings_reads_text_only(tmp_path: Path) -> None:
    processor = Processor.from_checkpoint(copied_directory(tmp_path / "copy", without=["preprocessor_config.json"]))
    assert processor.image_size is None
    assert processor.soft_tokens_per_image is None
    assert len(processor.process("Hello")) > 2
    with pytest.raises(InvalidArgumentError, match="reads text only"):
        processor.process("x", images=[PNG])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"height": 96, "width": 90}}, "square"),
        ({"size": {"shortest_edge": 96}}, "square"),
        ({"size": 0}, "size"),
        ({"size": None}, "size"),
        ({"size": "large"}, "size"),
        ({"resample": 17}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "std is 0"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": "tiny"}, "rescale_factor"),
        ({"pan_and_scan_max_num_crops": 0}, "pan_and_scan_max_num_crops"),
    ],
)
def test_unusable_image_settings_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    directory = copied_directory(tmp_path / "copy")
    edit_json(directory / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        Processor.from_checkpoint(directory)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\xfd"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    directory = copied_directory(tmp_path / "copy")
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Processor.from_checkpoint(directory)


@pytest.mark.parametrize("length", [0, -1, "16", 2.5])
def test_unusable_image_length_is_named(tmp_path: Path, length: Any) -> None:
    directory = copied_directory(tmp_path / "copy")
    edit_json(directory / "processor_config.json", image_seq_length=length)
    with pytest.raises(CheckpointError, match="image_seq_length"):
        Processor.from_checkpoint(directory)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vision_config": {"image_size": 896}}, r"image_size = 896.* 96"),
        ({"mm_tokens_per_image": 256}, r"mm_tokens_per_image = 256.* 16"),
        ({"image_token_index": 5}, "image_token_index = 5"),
        ({"vision_config": "none"}, "vision_config = 'none'"),
        ({"text_config": [1]}, r"text_config = \[1\]"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_files_that_contradict_the_model_are_named(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    directory = copied_directory(tmp_path / "copy")
    (directory / "config.json").write_text("{}")
    edit_json(directory / "config.json", **config)
    with pytest.raises(CheckpointError, match=words):
        Processor.from_checkpoint(directory)


def test_an_image_model_without_image_tokens_is_refused(tmp_path: Path) -> None:
    directory = copied_directory(tmp_path / "copy")
    edit_json(directory / "tokenizer_config.json", boi_token="<nowhere>", extra_special_tokens={})
    with pytest.raises(CheckpointError, match="boi_token is '<nowhere>'"):
        Processor.from_checkpoint(directory)
