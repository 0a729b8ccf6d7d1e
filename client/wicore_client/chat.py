"""A conversation: what was said, and the commands of a chat at the terminal."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from typing import Any

from wicore_client.client import Client
from wicore_client.errors import Cancelled, InvalidArgument, WicoreClientError
from wicore_client.requests import SamplingOptions, load_image
from wicore_client.results import Completion, Usage
from wicore_client.terminal import Terminal

HELP = "/image PATH adds a picture to the next question, /reset starts anew, /quit or Ctrl-D leaves"


class Conversation:
    """The turns so far, in the wire's form, and the pictures that they show."""

    def __init__(self, system: str | None = None) -> None:
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.images: list[bytes] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self.images = []

    def ask(self, question: str, images: list[bytes]) -> None:
        """The user's turn; its pictures stand before its text."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        self.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        self.images += images

    def answer(self, text: str) -> None:
        """The model's turn."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the user's last turn, which was not answered: turns must alternate."""
        parts = self.messages.pop()["content"]
        pictures = sum(part["type"] == "image" for part in parts)
        del self.images[len(self.images) - pictures :]


class Chat:
    """A conversation with a server, shown on a terminal."""

    def __init__(
        self, client: Client, terminal: Terminal, options: SamplingOptions, timeout: float | None, system: str | None
    ) -> None:
        self._client = client
        self._terminal = terminal
        self._options = options
        self._timeout = timeout
        self._conversation = Conversation(system)
        self._pictures: list[bytes] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self.show,
            "/reset": self._reset,
            "/help": lambda _: self._terminal.note(HELP),
        }

    def show(self, path: str) -> None:
        """Show a picture with the next question. Raises InvalidArgument if there is none."""
        with contextlib.suppress(ValueError):  # an odd quote: the path as it stands
            path = " ".join(shlex.split(path))
        self._pictures.append(load_image(path, len(self._conversation.images) + len(self._pictures) + 1))

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._pictures = []
        self._terminal.note("forgotten")

    def ask(self, question: str, *, live: bool = True) -> Completion:
        """One turn: the answer is shown as it comes (`live`) and returned.

        Raises
        ------
        WicoreClientError
            Whatever ends the answer early. What there is of it stays in the conversation; a question without any
            answer does not.
        KeyboardInterrupt
            For Ctrl-C, after the request is cancelled; likewise.
        """
        conversation, pictures = self._conversation, self._pictures
        conversation.ask(question, pictures)
        self._pictures = []
        stream = self._client.stream(
            conversation.messages, images=conversation.images, timeout=self._timeout, **self._options
        )
        try:
            with stream:
                if live:
                    self._terminal.wait()
                for chunk in stream:
                    if live:
                        self._terminal.answer(chunk.text)
                return stream.completion()
        finally:
            if stream.text:
                conversation.answer(stream.text)
                if live:
                    self._terminal.line()
            else:
                conversation.take_back()
                self._pictures = pictures

    def run(self) -> None:
        """Talk until /quit or the end of input."""
        self._terminal.note(HELP)
        while True:
            try:
                line = self._terminal.ask("> ").strip()
            except EOFError:
                self._terminal.line()
                return
            except KeyboardInterrupt:
                self._terminal.line()
                self._terminal.note("/quit or Ctrl-D leaves")
                continue
            if line == "/quit":
                return
            if line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif word.startswith("/"):
                self._terminal.note(f"no command {word}: {HELP}")
            else:
                self._terminal.note(summary(self.ask(line).usage))
        except KeyboardInterrupt:
            self._terminal.note("cancelled")
        except Cancelled:
            self._terminal.note("cancelled by the server")
        except WicoreClientError as error:
            self._terminal.error(str(error))
            if isinstance(error, InvalidArgument) and self._pictures:  # or the next question would be refused, too
                self._pictures = []
                self._terminal.note("its pictures are taken back; /image adds them again")


def summary(usage: Usage) -> str:
    """How long an answer took, in a few words."""
    count = usage.completion_tokens
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if usage.ttft_ms is not None:
        parts.append(f"first after {usage.ttft_ms / 1000:.2f} s")
    if usage.ttft_ms is not None and usage.total_ms is not None and usage.total_ms > usage.ttft_ms:
        parts.append(f"then {(count - 1) * 1000 / (usage.total_ms - usage.ttft_ms):.0f} a second")
    return ", ".join(parts)
