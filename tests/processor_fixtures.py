"""A small but real processor directory of Gemma-3's kind, and pictures of every sort to feed it."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image
from tokenizers import AddedToken
from transformers import GemmaTokenizer
from transformers.tokenization_utils_base import generate_merges

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
IMAGE_TOKEN = "<image_soft_token>"
NAMES = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": IMAGE_TOKEN,
}

# Kinds of user-defined pieces that Gemma-3's tokenizer.model has, in its order, fewer of each.
USER_DEFINED = (
    "<mask>",
    "[multimodal]",
    *(f"<unused{index}>" for index in range(8)),
    "<start_of_turn>",
    "<end_of_turn>",
    *("\n" * count for count in range(1, 9)),
    *("▁" * count for count in range(2, 9)),
    "<table>",
    "</table>",
    "<b>",
    "</b>",
    "\t",
    "<start_of_image>",
    "<end_of_image>",
)

# The chat template that Gemma-3's instruction-tuned checkpoints carry.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

CORPUS = (
    "The quick brown fox jumps over the lazy dog. 0123456789 + - * / = ? ! , ; : ' \" ( ) [ ] { } < >",
    "Describe this picture, please!  There are  two   spaces and    more.",
    "描述这张图片。红色的圆形在左上角。三个蓝色方块。请重复并反转下面的文字。",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass",
    "Here is the original image and here are some crops to help you see better",
    "café naïve Übergrößenträger Ελληνικά русский العربية हिन्दी 日本語 한국어",
    "aaa aaaa aaaaa aaaaaa ababab mississippi banana",
    "user model system turn image start end of the answer is forty two",
)

PREPROCESSOR_CONFIG: dict[str, Any] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 96, "width": 96},
}


@cache
def gemma_directory() -> Path:
    """A directory of `build_processor` that all tests share and none may change."""
    keeper = tempfile.TemporaryDirectory()
    atexit.register(keeper.cleanup)
    return build_processor(Path(keeper.name))


def copied_directory(target: Path, *, without: Collection[str] = ()) -> Path:
    """A copy of `gemma_directory` that a test may change, some files left out."""
    shutil.copytree(gemma_directory(), target, ignore=shutil.ignore_patterns(*without))
    return target


def build_processor(directory: Path, *, image_seq_length: int = 16, **preprocessor: Any) -> Path:
    """Every file of a Gemma-3 checkpoint but its model, small; `preprocessor` changes image settings."""
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(USER_DEFINED),
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    added = {vocab[token]: token for token in (*SPECIAL, *USER_DEFINED)} | {len(vocab): IMAGE_TOKEN}
    decoder = {
        index: AddedToken(token, normalized=False, special=token in (*SPECIAL, IMAGE_TOKEN))
        for index, token in sorted(added.items())
    }
    tokenizer = GemmaTokenizer(
        vocab=vocab, merges=generate_merges(vocab), added_tokens_decoder=decoder, add_bos_token=True, **NAMES
    )
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(index): {
                    "content": token.content,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": token.special,
                }
                for index, token in decoder.items()
            },
            **NAMES,
            "extra_special_tokens": {name: NAMES[name] for name in ("boi_token", "eoi_token", "image_token")},
            "clean_up_tokenization_spaces": False,
            "processor_class": "Gemma3Processor",
            "tokenizer_class": "GemmaTokenizer",
        },
    )
    write_json(directory / "added_tokens.json", {IMAGE_TOKEN: len(vocab)})
    write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(
        directory / "processor_config.json",
        {"image_seq_length": image_seq_length, "processor_class": "Gemma3Processor"},
    )
    write_json(directory / "preprocessor_config.json", PREPROCESSOR_CONFIG | preprocessor)
    return directory


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """The file with some keys changed."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def picture(width: int = 60, height: int = 40, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture whose every pixel matters: noise over a gradient, so that no resize or turn goes unnoticed."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 4))
    ramp = np.linspace(0, 127, width, dtype=int)[None, :, None] + np.zeros((height, 1, 1), dtype=int)
    rgba = Image.fromarray((noise + ramp).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgba.convert("L")).astype(np.uint16) * 256 + 7)
    if mode == "RGBA":
        return rgba
    return rgba.convert("LA" if mode == "LA" else "RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _sentences() -> Iterator[str]:
    for _ in range(20):
        yield from CORPUS
