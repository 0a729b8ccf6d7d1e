"""What one training example is: a conversation of turns, and who may see it (training or held-out evaluation)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import TYPE_CHECKING, TypeVar

from scripts.demo_data.words import Language

if TYPE_CHECKING:
    from scripts.demo_data.pictures import Scene

T = TypeVar("T")
HELD_OUT_SHARE = 10
"""One combination in this many is never trained on."""


class Split(Enum):
    """Training never sees a held-out combination; the evaluation sees nothing else."""

    TRAIN = "train"
    HELD_OUT = "held-out"

    def admits(self, *combination: object) -> bool:
        """Whether this combination (a sum, a name, a colour with a shape and a place) belongs to this split."""
        digest = zlib.crc32(repr(combination).encode())
        return (digest % HELD_OUT_SHARE == 0) == (self is Split.HELD_OUT)

    def draw(self, sample: Callable[[], T], combination: Callable[[T], tuple[object, ...]]) -> T:
        """Draws until a sample's combination belongs to this split."""
        while True:
            drawn = sample()
            if self.admits(*combination(drawn)):
                return drawn


@dataclass(frozen=True)
class Turn:
    """One question, its one right answer, and the name under which its accuracy is reported.

    `question` is text and pictures in the order in which the user sends them.
    """

    question: tuple[str | Scene, ...]
    answer: str
    skill: str


@dataclass(frozen=True)
class Conversation:
    """Turns that share one context. `system` goes in front of the first question, as Gemma-3 does it."""

    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self, *, up_to: int) -> list[dict[str, object]]:
        """Chat messages that end with question number `up_to`; a picture is `{"type": "image"}`."""
        messages: list[dict[str, object]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for index, turn in enumerate(self.turns[: up_to + 1]):
            content: list[dict[str, str]] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.question
            ]
            messages.append({"role": "user", "content": content})
            if index < up_to:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return messages

    def pictures(self, *, up_to: int) -> list[Scene]:
        """The pictures of the questions up to and with number `up_to`, in order."""
        return [part for turn in self.turns[: up_to + 1] for part in turn.question if not isinstance(part, str)]


@dataclass(frozen=True)
class Request:
    """What a skill is asked for: the random source, the language, the split, and roughly how long."""

    rng: Random
    language: Language
    split: Split
    tokens: int = 256
    """About how many tokens the turns may take; only skills with long contexts heed it."""
