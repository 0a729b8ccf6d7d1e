"""Tokens to text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class Detokenizer:
    """Text of one growing answer.

    Parameters
    ----------
    token_bytes
        The exact bytes of a token; empty for special tokens, which have no text.
    stop
        Texts that end the answer. Text that may turn out to be the start of one is held back.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the answer, once one has."""

    def push(self, token: int) -> str:
        """The text that `token` completes. After a stop string is found there is no more text."""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The text still held back when the answer ends for another reason than a stop string."""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The earliest wins, and of two at the same place the longer one.
            place, self.stopped_by = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
