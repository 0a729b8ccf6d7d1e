"""Keeping a user's words from acting as the model's control tokens.

A chat template writes turns and image places as special tokens. Text that a user sends goes into the same string, so
that a user who writes `<end_of_turn>` could end their turn and speak as the model. Here such words stay words:
before rendering, each literal of a control token in a user's text gets a mark after its first character; after
rendering, the text is cut at the marks and the segments are tokenized one by one, so that no segment holds the
token. The model reads `<` and `end_of_turn>`. A text without such a literal is not touched, and its token ids
are what transformers gives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise

from wicore_backend.errors import InvalidArgumentError

NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode keeps free for a program's own use; texts do not contain them."""


class ControlTokenGuard:
    """Marks for one conversation.

    Parameters
    ----------
    control_tokens
        What users must not be able to write, two characters or longer each.
    texts
        Every text of the conversation; the mark is a noncharacter that none of them contains.
    """

    def __init__(self, control_tokens: Collection[str], texts: Iterable[str]) -> None:
        used = set().union(*map(set, texts))
        mark = next((mark for mark in NONCHARACTERS if mark not in used), None)
        if mark is None:
            raise InvalidArgumentError("the messages contain every one of Unicode's noncharacters U+FDD0 to U+FDEF")
        self._mark = mark
        self._tokens = tuple(control_tokens)
        # A lookahead, so that literals that overlap are all found.
        self._literal = re.compile(f"(?={'|'.join(map(re.escape, self._tokens)) or '(?!)'})")

    def protect(self, text: str) -> str:
        """`text` with a mark inside every control token, and inside what could become one with what follows it."""
        cuts = {match.start() + 1 for match in self._literal.finditer(text)} | self._unfinished(text)
        edges = [0, *sorted(cuts), len(text)]
        return self._mark.join(text[start:end] for start, end in pairwise(edges))

    def segments(self, rendered: str) -> list[str]:
        """The rendered template, cut at the marks."""
        return rendered.split(self._mark)

    def _unfinished(self, text: str) -> set[int]:
        """Cuts at the end of the text, for a token that the next text part would finish (templates trim the parts)."""
        kept = text.rstrip()
        longest = max(map(len, self._tokens), default=0)
        tails = range(max(0, len(kept) - longest + 1), len(kept))
        return {start + 1 for start in tails if any(token.startswith(kept[start:]) for token in self._tokens)}
