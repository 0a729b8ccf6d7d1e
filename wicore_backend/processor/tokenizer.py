"""Text to token ids and back, as the checkpoint's own tokenizer files say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.processor.checkpoint_files import read_json_if_present
from wicore_backend.processor.tokenizer_backends import (
    SentencePieceBackend,
    TokenizerBackend,
    TokenizersBackend,
    load_sentencepiece,
    sentencepiece_vocab,
)

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

GEMMA_NAMES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
"""What transformers' GemmaTokenizer calls its tokens when no file says otherwise."""

GEMMA_TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")
"""Special by transformers' GemmaConverter, although `tokenizer.model` only calls them user-defined."""


class Tokenizer:
    """A checkpoint's tokenizer. Safe to share between threads.

    Attributes
    ----------
    names
        The tokens that the checkpoint names, by their role: `bos_token`, `boi_token`, `image_token` and so on.
    added_tokens
        Ids of the tokens that are cut out of a text before the rest is segmented, by their text.
    adds_bos
        Whether a text that no chat template has dressed is to start with `bos_id`.
    vocab_size
        One more than the largest token id, added tokens included.
    longest_piece
        Characters of the longest piece: n characters of text are at least n / longest_piece tokens.
    """

    def __init__(self, backend: TokenizerBackend, *, names: Mapping[str, str], adds_bos: bool) -> None:
        self._backend = backend
        self._pieces = {token_id: piece for piece, token_id in backend.vocab.items()}
        named_ids = (backend.vocab[token] for token in names.values() if token in backend.vocab)
        self._special_ids = backend.special_ids.union(named_ids)
        self.names = dict(names)
        self.added_tokens = dict(backend.added_tokens)
        self.adds_bos = adds_bos
        self.vocab_size = max(self._pieces, default=-1) + 1
        self.longest_piece = max(map(len, backend.vocab), default=1)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self:
        """The tokenizer of `tokenizer.json` or, without that file, of `tokenizer.model`.

        Raises
        ------
        CheckpointError
            Neither file is there, or one is damaged or not of Gemma's kind.
        """
        config = read_json_if_present(directory / "tokenizer_config.json")
        names = GEMMA_NAMES | _named_tokens(read_json_if_present(directory / "special_tokens_map.json"))
        names |= _named_tokens(config)
        json_file, model_file = directory / "tokenizer.json", directory / "tokenizer.model"
        if json_file.exists():
            backend = TokenizersBackend(json_file)
            return cls(backend, names=names, adds_bos=config.get("add_bos_token", backend.adds_bos))
        if model_file.exists():
            added, special = _added_tokens(directory, config, names)
            spm_backend = SentencePieceBackend(model_file, added_tokens=added, special_tokens=special)
            return cls(spm_backend, names=names, adds_bos=config.get("add_bos_token", True))
        raise CheckpointError(f"{directory} has neither tokenizer.json nor tokenizer.model")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it count as such, and no BOS is added.

        Raises
        ------
        InvalidArgumentError
            `text` has a lone surrogate, so that it is not Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = text[error.start]
            raise InvalidArgumentError(
                f"the text's character {error.start} is the lone surrogate {surrogate!r}; send valid Unicode"
            ) from None
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, as `bytes.decode` replaces them."""
        spell = self.token_bytes if skip_special_tokens else self._piece_bytes
        return b"".join(map(spell, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: one for a byte-fallback piece, UTF-8 of its text for any other.

        Special tokens, and ids that no piece has (a model's vocabulary may be padded), add nothing.
        """
        return b"" if self.is_special(token_id) else self._piece_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The piece as the vocabulary spells it ('▁' is a space, '<0x0A>' a byte); empty for an id without one."""
        return self._pieces.get(token_id, "")

    def token_id(self, token: str) -> int | None:
        """The id of the piece that is spelt `token`, if there is one."""
        return self._backend.vocab.get(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is no part of a text."""
        return token_id in self._special_ids

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self.token_text(token_id)
        if byte := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens, as text."""
        return [self._pieces[token_id] for token_id in sorted(self._special_ids)]

    @property
    def bos_id(self) -> int:
        """The id of the token that starts a sequence."""
        return self.named_id("bos_token")

    def named_id(self, name: str) -> int:
        """The id of the token with the role `name`; CheckpointError if the checkpoint has none."""
        token = self.names.get(name)
        token_id = None if token is None else self.token_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer's {name} is {token!r}, which its vocabulary does not hold")
        return token_id


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a tokenizer_config.json or special_tokens_map.json names.

    A token is its text or an object with its text as `content`. Roles that only some models know (`boi_token`) stand
    beside the others, or together under `extra_special_tokens` or `model_specific_special_tokens`.
    """
    names: dict[str, str] = {}
    for group in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(group), dict):
            names |= _named_tokens(config[group])
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            names[name] = text
    return names


def _added_tokens(
    directory: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, int], frozenset[str]]:
    """Added tokens, and which of them are special, where there is no tokenizer.json to list them.

    In this order: tokenizer_config.json's `added_tokens_decoder`, added_tokens.json, the model file's control tokens,
    Gemma's turn tokens, the named tokens. Named tokens that no file has an id for follow the vocabulary, as
    transformers appends them.
    """
    model = load_sentencepiece(directory / "tokenizer.model")
    vocab = sentencepiece_vocab(model)
    added: dict[str, int] = {}
    special: set[str] = set()
    try:
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(token_id)
            if token.get("special"):
                special.add(token["content"])
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise CheckpointError(
                    f"added token {token['content']!r} asks for lstrip, rstrip or single_word, "
                    "which needs tokenizer.json beside tokenizer.model"
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}/tokenizer_config.json: added_tokens_decoder is damaged: {error!r}"
        ) from None
    for token, token_id in read_json_if_present(directory / "added_tokens.json").items():
        if not isinstance(token_id, int):
            raise CheckpointError(f"{directory}/added_tokens.json gives {token!r} the id {token_id!r}")
        added.setdefault(token, token_id)
    control = [piece for piece, i in vocab.items() if model.is_control(i) or model.is_unknown(i)]
    turns = [token for token in GEMMA_TURN_TOKENS if token in vocab]
    for token in (*control, *turns, *names.values()):
        special.add(token)
        if token not in added:
            added[token] = vocab[token] if token in vocab else max(*vocab.values(), *added.values()) + 1
    return added, frozenset(special)
