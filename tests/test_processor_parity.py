"""The processor gives the token ids and pixels that transformers' Gemma3Processor gives for the same input."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import AutoProcessor

from tests.processor_fixtures import copied_directory, edit_json, encoded, gemma_directory, picture
from wicore_backend.processor.processor import Processor

DEMO = Path(__file__).parent.parent / "models" / "wicore-demo"
PIXEL_TOLERANCE = 1e-6


@cache
def transformers_processor(directory: Path) -> Any:
    return AutoProcessor.from_pretrained(directory)


@cache
def our_processor(directory: Path) -> Processor:
    return Processor.from_checkpoint(directory)


def opened(file: bytes) -> Image.Image:
    """The picture as a transformers user hands it over: opened and turned upright."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert upright is not None
    return upright


def assert_same(
    directory: Path,
    messages: list[dict[str, Any]],
    files: list[bytes],
    *,
    pictures: list[Image.Image] | None = None,
    ours: Processor | None = None,
    **images_kwargs: Any,
) -> None:
    """Token ids and pixels of both processors are the same; `pictures` are what transformers sees of `files`."""
    pictures = [opened(file) for file in files] if pictures is None else pictures
    reference = transformers_processor(directory)
    text = reference.apply_chat_template(messages, add_generation_prompt=True)
    expected = reference(
        text=text, images=pictures or None, add_special_tokens=False, return_tensors="np", **images_kwargs
    )
    processor = ours or our_processor(directory)
    prompt = processor.process(messages, images=files)

    assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist()
    soft_token = processor.tokenizer.named_id("image_token")
    spans = [index for image in prompt.images for index in range(image.start, image.end)]
    assert spans == np.flatnonzero(prompt.token_ids == soft_token).tolist()
    if pictures:
        pixels = processor.normalization.apply(np.stack([image.pixels for image in prompt.images]))
        assert pixels.shape == expected["pixel_values"].shape
        assert np.abs(pixels - expected["pixel_values"]).max() <= PIXEL_TOLERANCE


def user(*parts: str | None) -> dict[str, Any]:
    """A user message; None stands for an image."""
    return {
        "role": "user",
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


FILES = {
    **{
        f"png {mode}": encoded(picture(mode=mode, seed=index))
        for index, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA"))
    },
    "png palette with a transparent colour": encoded(picture(mode="P", seed=6), transparency=3),
    "png palette with alpha": encoded(picture(mode="RGBA", seed=7).quantize(16)),
    "png grey with a transparent shade": encoded(picture(mode="L", seed=8), transparency=100),
    "png colour with a transparent colour": encoded(picture(seed=8), transparency=(10, 20, 30)),
    "png fully transparent": encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 0))),
    "jpeg L": encoded(picture(mode="L", seed=9), "JPEG"),
    "jpeg RGB": encoded(picture(seed=10), "JPEG"),
    "jpeg CMYK": encoded(picture(mode="CMYK", seed=11), "JPEG"),
    "jpeg progressive": encoded(picture(seed=12), "JPEG", progressive=True),
    "jpeg of quality 5": encoded(picture(seed=13), "JPEG", quality=5),
    "jpeg of several pictures": encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=20)]),
    "webp RGB": encoded(picture(seed=14), "WEBP"),
    "webp RGBA": encoded(picture(mode="RGBA", seed=15), "WEBP"),
    "webp lossless": encoded(picture(seed=16), "WEBP", lossless=True),
    "webp animated": encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=3)]),
    "gif": encoded(picture(seed=17), "GIF"),
    "gif L": encoded(picture(mode="L", seed=18), "GIF"),
    "gif with a transparent colour": encoded(picture(mode="P", seed=19), "GIF", transparency=5),
    "gif animated": encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=4), picture(seed=5)]),
}

SIZES = ((1, 1), (1, 500), (500, 1), (2, 3), (95, 97), (96, 96), (97, 96), (640, 480), (31, 1000), (1000, 31))


@pytest.mark.parametrize("name", FILES)
def test_image_files_of_every_kind(name: str) -> None:
    assert_same(gemma_directory(), [user(None, "Describe this picture.")], [FILES[name]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(), kind, exif=exif.tobytes())
    assert Image.open(io.BytesIO(file)).getexif()[0x0112] == orientation
    assert_same(gemma_directory(), [user(None, "up?")], [file])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_image_sizes(width: int, height: int) -> None:
    assert_same(gemma_directory(), [user(None, "x")], [encoded(picture(width, height))])


def test_sixteen_bit_grey_is_seen_as_its_high_bytes() -> None:
    """Pillow's own conversion, which transformers takes, would clip all but the darkest 1/256 to white."""
    file, as_bytes = encoded(picture(mode="I;16")), picture(mode="L")
    assert Image.open(io.BytesIO(file)).mode == "I;16"
    assert_same(gemma_directory(), [user(None, "x")], [file], pictures=[as_bytes])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pil_images_of_every_mode(mode: str) -> None:
    image = picture().convert("RGB").convert("LA" if mode == "LA" else mode) if mode != "LAB" else lab_picture()
    assert_same(gemma_directory(), [user(None, "x")], [image], pictures=[image])  # type: ignore[list-item]


def lab_picture() -> Image.Image:
    return Image.merge("LAB", picture().split())


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "plain text": ([said("user", "The quick brown fox")], 0),
    "spaces around": ([said("user", "  \n two  spaces \t\n\n")], 0),
    "line breaks inside": ([said("user", "a\n\n\nb\r\nc\n" + "\n" * 20 + "d")], 0),
    "runs of spaces": ([said("user", "x" + " " * 50 + "y" + " " * 31 + "z")], 0),
    "chinese": ([said("user", "描述这张图片。红色的圆形在哪里？")], 0),
    "emoji": ([said("user", "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪 ok 👍🏽")], 0),
    "right to left and combining": ([said("user", "العربية e\u0301 a\u0308 हिन्दी ﷺ \u200f\u200e")], 0),
    "control characters": ([said("user", "a\x00b\x01c\x7f\u0085d\u2028e\ufeff")], 0),
    "beyond the basic plane": ([said("user", "𝕳𝖊𝖑𝖑𝖔 𠀀𠀁 \U0010ffff")], 0),
    "a literal ▁": ([said("user", "a▁b▁▁c ▁ d")], 0),
    "html that Gemma has pieces for": ([said("user", "<table><b>bold</b></table> <unused3> [multimodal]")], 0),
    "half a control token": ([said("user", "if a < b: <start_of > <end_of_turn <bos")], 0),
    "byte pieces spelt out": ([said("user", "<0x41><0x0A>")], 0),
    "digits": ([said("user", "3.14159 1234567890 ١٢٣")], 0),
    "long": ([said("user", "The value of apple is 17. 苹果的值是十七。\n" * 300)], 0),
    "system": ([said("system", "Answer briefly."), said("user", "Hi")], 0),
    "system as a part": (
        [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, user(None, "What is it?")],
        1,
    ),
    "several turns": ([said("user", "1+1?"), said("assistant", "2"), said("user", "and 2+2?")], 0),
    "assistant last": ([said("user", "1+1?"), said("assistant", "It is")], 0),
    "image first": ([user(None, "What is this?")], 1),
    "image last": ([user("What is this?", None)], 1),
    "image only": ([user(None)], 1),
    "image between": ([user("Before ", None, " after")], 1),
    "line breaks around the image": ([user("Before\n", None, "\n\nafter\n")], 1),
    "two images side by side": ([user(None, None, "Which is larger?")], 2),
    "images in several turns": (
        [user(None, "One?"), said("assistant", "Yes."), user("And ", None, " or ", None, "?")],
        3,
    ),
    "sixteen images": ([user(*[None] * 16, "How many?")], 16),
    "several text parts": ([user("a", "b ", " c", "")], 0),
    "an empty turn between": ([said("user", "a"), said("assistant", ""), said("user", "b")], 0),
}


@pytest.mark.parametrize("directory", ["small", "demo"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str, directory: str) -> None:
    messages, count = CONVERSATIONS[name]
    if directory == "demo" and count > 2:
        pytest.skip("large pixels, and nothing that the small directory does not show")
    files = [encoded(picture(50 + index, 40, seed=index)) for index in range(count)]
    assert_same(gemma_directory() if directory == "small" else DEMO, messages, files)


PAN_AND_SCAN_SIZES = (
    (96, 96),
    (100, 50),
    (50, 100),
    (130, 30),
    (30, 200),
    (119, 100),
    (120, 100),
    (333, 64),
    (61, 200),
)


@pytest.mark.parametrize(("width", "height"), PAN_AND_SCAN_SIZES)
def test_pan_and_scan(tmp_path: Path, width: int, height: int) -> None:
    settings: dict[str, Any] = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 24,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    directory = copied_directory(tmp_path / "scan")
    edit_json(directory / "preprocessor_config.json", **settings)
    files = [encoded(picture(width, height)), encoded(picture(width + 1, height, seed=1))]
    messages = [user("Compare ", None, " with ", None)]
    assert_same(directory, messages, files, ours=Processor.from_checkpoint(directory), **settings)


def test_pan_and_scan_with_the_defaults_of_gemma3() -> None:
    processor = Processor.from_checkpoint(gemma_directory(), do_pan_and_scan=True)
    files = [encoded(picture(1100, 300)), encoded(picture(300, 300))]
    assert_same(gemma_directory(), [user(None, "and", None)], files, ours=processor, do_pan_and_scan=True)
    prompt = processor.process([user(None, "and", None)], images=files)
    assert len(prompt.images) == 1 + 4 + 1


IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "ImageNet statistics": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "another size": {"size": {"height": 42, "width": 42}},
    "bicubic": {"resample": 3},
    "lanczos": {"resample": 1},
    "nearest": {"resample": 0},
    "another rescale factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "no normalization": {"do_normalize": False},
    "no rescaling": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
}


@pytest.mark.parametrize("name", IMAGE_SETTINGS)
def test_image_settings_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    directory = copied_directory(tmp_path / "settings")
    edit_json(directory / "preprocessor_config.json", **IMAGE_SETTINGS[name])
    assert_same(directory, [user(None, "x")], [encoded(picture(200, 130))], ours=Processor.from_checkpoint(directory))


@pytest.mark.parametrize(
    "text", ["Once upon a time", " leading space", "看图 <start_of_image> 说话", "<start_of_turn>user\nx"]
)
def test_raw_text(text: str) -> None:
    files = [encoded(picture())] * text.count("<start_of_image>")
    expected = transformers_processor(gemma_directory())(text=text, images=[opened(file) for file in files] or None)
    prompt = our_processor(gemma_directory()).process(text, images=files, raw=True)
    assert prompt.token_ids.tolist() == expected["input_ids"][0]


def test_a_question_is_one_user_turn_with_its_images_first() -> None:
    processor = our_processor(gemma_directory())
    files = [encoded(picture(seed=1)), encoded(picture(seed=2))]
    question = processor.process("Which?", images=files)
    messages = processor.process([user(None, None, "Which?")], images=files)
    assert question.token_ids.tolist() == messages.token_ids.tolist()
    assert [image.digest for image in question.images] == [image.digest for image in messages.images]


def test_files_that_transformers_5_saves_give_the_same_prompt(tmp_path: Path) -> None:
    """Its save_pretrained nests the image processor and writes the template to a file of its own."""
    transformers_processor(gemma_directory()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert (tmp_path / "chat_template.jinja").exists()
    assert_same(gemma_directory(), [user(None, "Hi")], [FILES["gif"]], ours=Processor.from_checkpoint(tmp_path))
