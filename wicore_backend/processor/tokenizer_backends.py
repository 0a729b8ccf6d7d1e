"""The two libraries that can turn text into token ids, behind one face: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from wicore_backend.errors import CheckpointError

GEMMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""What tokenizer.json says of turning pieces into text, in every Gemma checkpoint."""


class TokenizerBackend(Protocol):
    """A vocabulary and the segmentation of text into its pieces."""

    @property
    def vocab(self) -> Mapping[str, int]:
        """Ids of all pieces, added tokens included."""
        ...

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that are cut out of a text before the model segments the rest."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of those of them that steer the model and are no text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing put before or after them."""
        ...


class TokenizersBackend:
    """`tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception for whatever it finds in the file
            raise CheckpointError(f"{path} cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._check_decoder(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def adds_bos(self) -> bool:
        """Whether the file's own post-processor puts a special token around a text."""
        return bool(self._tokenizer.num_special_tokens_to_add(False))

    def _check_decoder(self, path: Path) -> None:
        """Pieces become bytes in `Tokenizer.token_bytes` as Gemma's decoder has it, so another decoder is refused."""
        decoder = self._tokenizer.decoder
        seen = None if decoder is None else json.loads(decoder.__getstate__())
        if seen != GEMMA_DECODER:
            raise CheckpointError(f"{path} has the decoder {reprlib.repr(seen)}; Gemma's is {GEMMA_DECODER}")


class SentencePieceBackend:
    """`tokenizer.model`, run by the `sentencepiece` library.

    Parameters
    ----------
    path
        The model file.
    added_tokens
        Ids of the added tokens by their text. A token that the model file does not hold may have any free id.
    special_tokens
        Those of them that are special.
    """

    def __init__(self, path: Path, *, added_tokens: Mapping[str, int], special_tokens: frozenset[str]) -> None:
        model = load_sentencepiece(path)
        self._model = model
        self.vocab: Mapping[str, int] = sentencepiece_vocab(model) | dict(added_tokens)
        self.added_tokens = added_tokens
        self.special_ids = frozenset(added_tokens[token] for token in special_tokens)
        self._first = re.compile("|".join(sorted({re.escape(token[0]) for token in added_tokens})) or "(?!)")
        self._lengths = sorted({len(token) for token in added_tokens}, reverse=True)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._split(text):
            token_id = self.added_tokens.get(piece)
            if token_id is None:
                ids.extend(self._model.encode(piece))
            else:
                ids.append(token_id)
        return ids

    def _split(self, text: str) -> Iterator[str]:
        """Added tokens, leftmost first and the longest at each place, and the text between them."""
        start = position = 0
        while first := self._first.search(text, position):
            token = self._added_token_at(text, first.start())
            if token is None:
                position = first.start() + 1
                continue
            if start < first.start():
                yield text[start : first.start()]
            yield token
            start = position = first.start() + len(token)
        if start < len(text):
            yield text[start:]

    def _added_token_at(self, text: str, position: int) -> str | None:
        candidates = (text[position : position + length] for length in self._lengths)
        return next((candidate for candidate in candidates if candidate in self.added_tokens), None)


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model in `path`; CheckpointError if it is no SentencePiece model or treats spaces as Gemma's does not."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        starts = ["".join(model.encode(text, out_type=str)) for text in ("a", " a")]
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from None
    if starts != ["a", "▁a"]:
        raise CheckpointError(f"{path} adds or removes spaces at the start of a text; Gemma's model keeps it as it is")
    return model


def sentencepiece_vocab(model: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Ids of the model's pieces."""
    return {model.id_to_piece(token_id): token_id for token_id in range(model.get_piece_size())}
