"""Log-probabilities of the wire in OpenAI's two forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


_ENDS = frozenset({"<end_of_turn>", "<eos>"})
"""Pieces that end Gemma-3's answers; no text is made of them."""


def token_bytes(piece: str) -> bytes:
    """The bytes that a piece of the vocabulary stands for: '▁' is a space, '<0x0A>' a byte."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8", "replace")


def token_text(piece: str) -> str:
    """Its text; a byte that is no character by itself is spelt `bytes:\\xe4`, as OpenAI does."""
    raw = token_bytes(piece)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(logprobs: Mapping[str, Any]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat completion: of the tokens of its text, which the one that ends it is not."""
    said = (entry for entry in logprobs["tokens"] if entry["token"] not in _ENDS)
    return {"content": [_chat_entry(e) | {"top_logprobs": [_chat_entry(t) for t in e["top"]]} for e in said]}


def _chat_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    raw = token_bytes(entry["token"])
    return {"token": token_text(entry["token"]), "logprob": entry["logprob"], "bytes": list(raw)}


class TextLogprobs:
    """The `logprobs` of a choice of a text completion, part by part: offsets count through the whole answer.

    Parameters
    ----------
    offset
        Where the first token's text begins.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def part(self, entries: list[dict[str, Any] | None]) -> dict[str, Any]:
        """What these tokens add. None stands for a token without a log-probability, the first of a prompt."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            if entry is None:
                continue  # the beginning-of-text token, which is no part of the text
            token = token_text(entry["token"])
            tokens.append(token)
            values.append(entry["logprob"])
            tops.append({token_text(top["token"]): top["logprob"] for top in entry["top"]} or None)
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
