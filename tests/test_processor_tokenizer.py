"""Text to ids and back: both tokenizer files, every kind of piece, random Unicode."""

from __future__ import annotations

import codecs
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.processor_fixtures import CORPUS, SPECIAL, USER_DEFINED, copied_directory, edit_json, gemma_directory
from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.processor.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "models" / "wicore-demo"

# Random text that often comes near what is special: spaces, line breaks, markup, pieces of control tokens.
NEAR_MISSES = [*SPECIAL, *USER_DEFINED, *" \n\t▁<>a", "<0x41>", "turn>", "<start_of_", "图片", "🙂", "é", "aaa"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(NEAR_MISSES), max_size=20).map("".join),
)


@cache
def tokenizers_of(directory: Path) -> tuple[Tokenizer, Tokenizer, Any]:
    """By tokenizer.json, by tokenizer.model, and transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (*directory.glob("*token*.json"), directory / "tokenizer.model"):
            if file.name != "tokenizer.json":
                shutil.copy(file, folder)
        by_model = Tokenizer.from_checkpoint(Path(folder))
    return Tokenizer.from_checkpoint(directory), by_model, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("directory", [gemma_directory(), DEMO], ids=["small", "demo"])
@settings(max_examples=400, deadline=None)
@given(text=TEXT)
def test_both_files_and_transformers_agree_on_random_text(directory: Path, text: str) -> None:
    by_json, by_model, reference = tokenizers_of(directory)
    ids = by_json.encode(text)
    assert ids == by_model.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    for skip in (False, True):
        decoded = by_json.decode(ids, skip_special_tokens=skip)
        assert decoded == by_model.decode(ids, skip_special_tokens=skip)
        assert decoded == reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_decoding_gives_the_text_back(text: str) -> None:
    """With one difference that SentencePiece cannot tell: '▁' reads as a space."""
    tokenizer = tokenizers_of(gemma_directory())[0]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 1000), max_size=30))
def test_token_bytes_add_up_to_the_decoded_text(ids: list[int]) -> None:
    """A streaming decoder that is fed the bytes of one token after the other ends with the same text."""
    tokenizer = tokenizers_of(gemma_directory())[0]
    stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = "".join(stream.decode(tokenizer.token_bytes(token_id)) for token_id in ids) + stream.decode(b"", final=True)
    assert text == tokenizer.decode(ids)


def test_bytes_of_each_kind_of_piece() -> None:
    tokenizer = tokenizers_of(gemma_directory())[0]

    def bytes_of(piece: str) -> bytes:
        token_id = tokenizer.token_id(piece)
        assert token_id is not None
        return tokenizer.token_bytes(token_id)

    assert bytes_of("<0xE4>") == b"\xe4"
    assert bytes_of("▁▁▁") == b"   "
    assert bytes_of("\n\n") == b"\n\n"
    assert bytes_of("图片") == "图片".encode()
    assert bytes_of("<table>") == b"<table>"
    assert bytes_of("<end_of_turn>") == b""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(10**9) == b""


def test_special_tokens_are_special_and_others_are_not() -> None:
    for tokenizer in tokenizers_of(gemma_directory())[:2]:
        specials = {*SPECIAL, "<image_soft_token>"}
        for token in specials:
            token_id = tokenizer.token_id(token)
            assert token_id is not None
            assert tokenizer.is_special(token_id)
            assert tokenizer.encode(token) == [token_id]
        for token in ("<table>", "\n\n", "<unused0>", "a"):
            token_id = tokenizer.token_id(token)
            assert token_id is not None
            assert not tokenizer.is_special(token_id)
        assert tokenizer.bos_id == 2
        assert tokenizer.adds_bos


@pytest.mark.parametrize("text", CORPUS)
def test_model_file_without_any_list_of_added_tokens(tmp_path: Path, text: str) -> None:
    """tokenizer.model alone: control tokens come from the model, turn tokens and the image token from Gemma's rules."""
    (tmp_path / "tokenizer.model").write_bytes((gemma_directory() / "tokenizer.model").read_bytes())
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    edit_json(tmp_path / "tokenizer_config.json", extra_special_tokens=names)
    tokenizer, reference = Tokenizer.from_checkpoint(tmp_path), tokenizers_of(gemma_directory())[0]
    marked = f"<bos><start_of_turn>user\n<image_soft_token>{text}<end_of_turn>"
    assert tokenizer.bos_id == reference.bos_id
    assert tokenizer.encode(marked) == reference.encode(marked)
    assert tokenizer.decode(tokenizer.encode(marked)) == reference.decode(reference.encode(marked))


def test_lone_surrogate_is_refused() -> None:
    for tokenizer in tokenizers_of(gemma_directory())[:2]:
        with pytest.raises(InvalidArgumentError, match=r"character 2 is the lone surrogate '\\ud800'"):
            tokenizer.encode("ab\ud800")


def test_config_decides_about_bos(tmp_path: Path) -> None:
    directory = copied_directory(tmp_path / "copy")
    edit_json(directory / "tokenizer_config.json", add_bos_token=False)
    assert not Tokenizer.from_checkpoint(directory).adds_bos


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_json_is_named(tmp_path: Path, content: bytes) -> None:
    directory = copied_directory(tmp_path / "copy")
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_checkpoint(directory)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_damaged_tokenizer_model_is_named(tmp_path: Path, content: bytes) -> None:
    directory = copied_directory(tmp_path / "copy", without=["tokenizer.json"])
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.from_checkpoint(directory)


@pytest.mark.parametrize(
    "decoder",
    [{"900": "x"}, {"nine": {"content": "x"}}, {"900": {}}, [1], {"900": {"content": "<x>", "lstrip": True}}],
)
def test_damaged_list_of_added_tokens_is_named(tmp_path: Path, decoder: Any) -> None:
    directory = copied_directory(tmp_path / "copy", without=["tokenizer.json"])
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(CheckpointError, match="added"):
        Tokenizer.from_checkpoint(directory)


def test_decoder_of_another_family_is_refused(tmp_path: Path) -> None:
    directory = copied_directory(tmp_path / "copy")
    edit_json(
        directory / "tokenizer.json", decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    )
    with pytest.raises(CheckpointError, match="decoder"):
        Tokenizer.from_checkpoint(directory)
