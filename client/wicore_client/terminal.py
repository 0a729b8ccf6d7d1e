"""Where answers are shown: a terminal gets colours and a sign of life, a pipe gets the text and nothing else."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and newline: a terminal obeys them, and neither a model nor a server is to give it orders."""
_BOLD, _DIM, _RESET, _ERASE_LINE = "\033[1m", "\033[2m", "\033[0m", "\r\033[K"


class Terminal:
    """Text for people, on two channels: answers on `out`, everything else on `err`."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self.interactive = self._out.isatty()
        self._waiting = False

    def answer(self, text: str) -> None:
        """A piece of an answer, at once."""
        if text:
            self._end_wait()
            self._out.write(_CONTROLS.sub("", text) if self.interactive else text)
            self._out.flush()

    def line(self, text: str = "") -> None:
        """A line of output."""
        self.answer(text + "\n")

    def note(self, text: str) -> None:
        """A line beside the answer, for whoever watches; a pipe does not get it."""
        self._end_wait()
        if self._err.isatty():
            self._err.write(f"{_DIM}{one_line(text)}{_RESET}\n")
            self._err.flush()

    def error(self, text: str) -> None:
        """A line about what went wrong."""
        self._end_wait()
        self._err.write(f"wicore: {one_line(text)}\n")
        self._err.flush()

    def wait(self) -> None:
        """Show that an answer is on its way, until there is something to show."""
        if self.interactive and not self._waiting:
            self._out.write(f"{_DIM}...{_RESET}")
            self._out.flush()
            self._waiting = True

    def _end_wait(self) -> None:
        if self._waiting:
            self._waiting = False
            self._out.write(_ERASE_LINE)
            self._out.flush()

    def ask(self, prompt: str) -> str:
        """A line from the keyboard. Raises EOFError at its end, KeyboardInterrupt for Ctrl-C."""
        with contextlib.suppress(ImportError):  # where Python has it: `input` then edits and remembers lines
            import readline  # noqa: F401
        # \001 and \002 tell readline that what is between them takes no place on the line.
        return input(f"\001{_BOLD}\002{prompt}\001{_RESET}\002" if self.interactive else prompt)


def one_line(text: str) -> str:
    """`text` on one line, harmless to a terminal."""
    return _CONTROLS.sub("", " ".join(text.split()))
