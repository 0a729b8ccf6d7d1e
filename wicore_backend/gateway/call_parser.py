"""Calls of tools, found in an answer's text while it comes. Nothing depends on how the text is cut."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from wicore_backend.gateway.call_format import call_opening

_BLANK = re.compile(r"[ \t]*")
_FENCE = re.compile(r"[ \t]*```\w*[ \t]*")
_FENCE_BEGUN = re.compile(r"[ \t]*(`{1,2}|```\w*[ \t]*)")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins, the `index`-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Part = TextDelta | CallStart | CallArguments


class _State(Enum):
    TEXT = auto()
    ARGUMENTS = auto()
    BETWEEN = auto()
    """After a call, or all of them."""


class ToolCallParser:
    """Reads one answer of the form that `call_format` describes.

    Calls begin with a line of their own. White space before them and a code fence that the text opens for them belong
    to neither. Text that cannot be told from these yet is held back. What follows the last call is dropped: the
    grammar lets nothing follow but the end of that fence.

    Parameters
    ----------
    names
        Of the functions that may be called.
    new_id
        Gives each call its id.
    """

    def __init__(
        self, names: Iterable[str], *, new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}"
    ) -> None:
        self._openings = {call_opening(name): name for name in names}
        self._opening = re.compile("|".join(map(re.escape, self._openings)))
        self._new_id = new_id
        self._state = _State.TEXT
        self._rest = ""
        self._said = False
        """Whether text has been given: if so, `_rest` begins in the middle of a line."""
        self._calls = 0
        self._arguments = _JsonValue()

    @property
    def called(self) -> bool:
        """Whether there are calls, all of them whole."""
        return self._calls > 0 and self._state is _State.BETWEEN

    def feed(self, text: str) -> list[Part]:
        """What more of the answer adds to what has been told."""
        self._rest += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, now that nothing follows."""
        rest, self._rest = self._rest, ""
        return [TextDelta(rest)] if rest and self._state is _State.TEXT else []

    def _advance(self, parts: list[Part]) -> bool:
        """Take what can be taken; whether more may be."""
        match self._state:
            case _State.TEXT:
                return self._read_text(parts)
            case _State.ARGUMENTS:
                return self._read_arguments(parts)
            case _State.BETWEEN:
                return self._read_between(parts)

    def _read_text(self, parts: list[Part]) -> bool:
        lines = self._rest.split("\n")
        for number, line in enumerate(lines):
            if (number or not self._said) and (opening := self._opening.match(line)):
                self._say(lines[: self._first_held(lines[:number], fences=0)], parts)
                after = "\n".join([line[opening.end() :], *lines[number + 1 :]])
                self._begin(opening[0], after, parts)
                return True
        *before, last = lines
        fence = bool(_FENCE_BEGUN.fullmatch(last))
        opens = fence or _BLANK.fullmatch(last) or any(opening.startswith(last) for opening in self._openings)
        if opens and (before or not self._said):
            lines = lines[: self._first_held(before, fences=fence)]
        said = self._say(lines, parts)
        self._rest = self._rest[said:]
        return False

    def _first_held(self, lines: Sequence[str], *, fences: int) -> int:
        """The first of the lines at the end that belong to a call that follows: blank ones, and one fence at most."""
        first = len(lines)
        while first > (1 if self._said else 0):
            line = lines[first - 1]
            fence = bool(_FENCE.fullmatch(line))
            fences += fence
            if fences > 1 or not (fence or _BLANK.fullmatch(line)):
                break
            first -= 1
        return first

    def _say(self, lines: Sequence[str], parts: list[Part]) -> int:
        """Give these lines of the text; returns their length."""
        text = "\n".join(lines)
        if text:
            parts.append(TextDelta(text))
            self._said = True
        return len(text)

    def _begin(self, opening: str, rest: str, parts: list[Part]) -> None:
        parts.append(CallStart(self._calls, self._new_id(), self._openings[opening]))
        self._calls += 1
        self._state, self._rest, self._arguments = _State.ARGUMENTS, rest, _JsonValue()

    def _read_arguments(self, parts: list[Part]) -> bool:
        length = self._arguments.feed(self._rest)
        text, self._rest = self._rest[:length], self._rest[length:]
        if text:
            parts.append(CallArguments(self._calls - 1, text))
        if self._arguments.whole:
            self._state = _State.BETWEEN
        return self._arguments.whole

    def _read_between(self, parts: list[Part]) -> bool:
        _, line_break, line = self._rest.partition("\n")
        opening = self._opening.match(line) if line_break else None
        if opening is None:
            return False
        self._begin(opening[0], line[opening.end() :], parts)
        return True


class _JsonValue:
    """How far a JSON object has come: its end is where its braces are even."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.whole = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.whole = True
                    return i + 1
        return len(text)
