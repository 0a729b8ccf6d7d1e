"""Conversations as packed streams of tokens, in fixed shapes, ready for the training twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from scripts.demo_data import tokenizer as tok
from scripts.demo_data.conversation import Conversation, Split
from scripts.demo_data.pictures import Scene
from scripts.demo_data.rendering import scene_parameters
from scripts.demo_data.skills import draw_conversation, draw_length, draw_needles
from scripts.demo_data.tokenizer import UnitEncoder

ANSWER_WEIGHTS = {"facts": 2.0, "sum": 3.0}
"""Skills whose answers are few and short count more in the loss, by the first part of the skill's name."""
FACTS_SHARE = 0.3
"""The share of a pack's tokens that lists of facts take."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as ids, with the places of its pictures and answers."""

    ids: list[int]
    pictures: list[tuple[int, Scene]]
    """(row of the first soft token, scene)"""
    answers: list[tuple[int, int, str]]
    """(first row, row after the final <end_of_turn>, skill)"""


def encode_conversation(conversation: Conversation, encoder: UnitEncoder, *, image_tokens: int) -> Encoded:
    """The ids that the checkpoint's chat template and processor give, without their cost."""
    encoded = Encoded([tok.BOS], [], [])
    ids = encoded.ids
    reply, closing = encoder.encode("model\n"), encoder.encode("\n")
    text = "user\n" + ("" if conversation.system is None else f"{conversation.system}\n\n")
    for turn in conversation.turns:
        ids.append(tok.START_OF_TURN)
        for part in turn.question:
            if isinstance(part, str):
                text += part
                continue
            ids += encoder.encode(text + "\n\n")
            ids.append(tok.START_OF_IMAGE)
            encoded.pictures.append((len(ids), part))
            ids += [tok.IMAGE_SOFT_TOKEN] * image_tokens
            ids.append(tok.END_OF_IMAGE)
            text = "\n\n"
        ids += (*encoder.encode(text), tok.END_OF_TURN, *closing, tok.START_OF_TURN, *reply)
        first = len(ids)
        ids += (*encoder.encode(turn.answer), tok.END_OF_TURN)
        encoded.answers.append((first, len(ids), turn.skill))
        ids += closing
        text = "user\n"
    return encoded


@dataclass
class Pack:
    """N tokens of whole conversations; the tail is padding that sees only itself.

    Fields with K rows are about answer tokens (K = N // 4); unused rows have weight 0 and turn -1.
    """

    ids: Tensor  # [N] int64
    positions: Tensor  # [N]
    starts: Tensor  # [N]
    limits: Tensor  # [N]
    picture_rows: Tensor  # [M * image_tokens], N where there is no picture
    scenes: Tensor  # [M, SCENE_FIELDS]
    things: Tensor  # [M, MOST_THINGS, THING_FIELDS]
    is_picture: Tensor  # [M] bool
    answer_rows: Tensor  # [K]
    targets: Tensor  # [K]
    weights: Tensor  # [K] float32
    turns: Tensor  # [K]
    skills: list[str] = field(default_factory=list)
    """The skill of each turn."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Pack:
        """The pack with every tensor changed."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def pin_memory(self) -> Pack:
        """Called by the data loader."""
        return self.map(Tensor.pin_memory)


class Packer:
    """Fills one pack with conversations until the next does not fit."""

    def __init__(self, encoder: UnitEncoder, *, tokens: int, pictures: int, image_tokens: int) -> None:
        self.encoder = encoder
        self.tokens = tokens
        self.pictures = pictures
        self.image_tokens = image_tokens

    def pack(self, rng: Random, conversations: Callable[[int], Conversation | None]) -> Pack:
        """`conversations(room)` gives a conversation that should fit in `room` tokens, or None to close the pack."""
        chosen: list[Encoded] = []
        room, picture_room, failures = self.tokens, self.pictures, 0
        while failures < 8:
            conversation = conversations(room)
            if conversation is None:
                break
            encoded = encode_conversation(conversation, self.encoder, image_tokens=self.image_tokens)
            if len(encoded.ids) > room or len(encoded.pictures) > picture_room:
                failures += 1
                continue
            chosen.append(encoded)
            room -= len(encoded.ids)
            picture_room -= len(encoded.pictures)
        rng.shuffle(chosen)
        return self._assemble(chosen, rng)

    def _assemble(self, chosen: list[Encoded], rng: Random) -> Pack:
        ids = np.full(self.tokens, tok.PAD, dtype=np.int64)
        positions = np.zeros(self.tokens, dtype=np.int64)
        starts = np.arange(self.tokens, dtype=np.int64)
        limits = np.arange(self.tokens, dtype=np.int64)
        picture_rows = np.full((self.pictures, self.image_tokens), self.tokens, dtype=np.int64)
        capacity = self.tokens // 4
        rows: list[int] = []
        weights: list[float] = []
        turns: list[int] = []
        skills: list[str] = []
        scenes: list[Scene] = []
        at = 0
        for encoded in chosen:
            end = at + len(encoded.ids)
            ids[at:end] = encoded.ids
            positions[at:end] = np.arange(end - at)
            starts[at:end] = at
            for row, scene in encoded.pictures:
                span = slice(at + row, at + row + self.image_tokens)
                limits[span] = span.stop - 1
                picture_rows[len(scenes)] = np.arange(span.start, span.stop)
                scenes.append(scene)
            for first, last, skill in encoded.answers:
                if len(rows) + last - first > capacity:
                    break
                rows += range(at + first - 1, at + last - 1)
                weights += [ANSWER_WEIGHTS.get(skill.split("/")[0], 1.0)] * (last - first)
                turns += [len(skills)] * (last - first)
                skills.append(skill)
            at = end
        # The padding tail is one sequence of tokens that see themselves only.
        answer_rows = torch.zeros(capacity, dtype=torch.int64)
        answer_rows[: len(rows)] = torch.tensor(rows, dtype=torch.int64)
        flat_ids = torch.from_numpy(ids)
        fields, things = scene_parameters(scenes, softness=[rng.uniform(0.7, 4.0) for _ in scenes])
        return Pack(
            ids=flat_ids,
            positions=torch.from_numpy(positions),
            starts=torch.from_numpy(starts),
            limits=torch.from_numpy(limits),
            picture_rows=torch.from_numpy(picture_rows.reshape(-1)),
            scenes=_padded(fields, self.pictures, fill=1.0),
            things=_padded(things, self.pictures, fill=1.0),
            is_picture=torch.arange(self.pictures) < len(scenes),
            answer_rows=answer_rows,
            targets=flat_ids[(answer_rows + 1).clamp(max=self.tokens - 1)],
            weights=_padded(torch.tensor(weights), capacity, fill=0.0),
            turns=_padded(torch.tensor(turns, dtype=torch.int64), capacity, fill=-1),
            skills=skills,
        )


def _padded(rows: Tensor, count: int, *, fill: float) -> Tensor:
    padding = torch.full((count - len(rows), *rows.shape[1:]), fill, dtype=rows.dtype)
    return torch.cat((rows, padding))


def training_pack(packer: Packer, rng: Random, split: Split, *, longest: int) -> Pack:
    """Lists of facts of up to `longest` tokens for FACTS_SHARE of the pack, then everything else."""
    facts_room = packer.tokens * (1 - FACTS_SHARE)

    def conversations(room: int) -> Conversation | None:
        if room < 64:
            return None
        if room > facts_room + 256:
            longest_now = min(longest, room)
            return draw_needles(rng, split, tokens=int(0.9 * draw_length(rng, longest=longest_now)))
        return draw_conversation(rng, split, longest_list=min(2048, room // 2))

    return packer.pack(rng, conversations)


class PackStream(IterableDataset[Pack]):
    """Endless packs from worker processes; `longest` is shared memory that the trainer turns up as it goes."""

    def __init__(self, packer: Packer, *, seed: int, split: Split, longest: Tensor) -> None:
        self._packer = packer
        self._seed = seed
        self._split = split
        self._longest = longest

    def __iter__(self) -> Iterator[Pack]:
        worker = get_worker_info()
        rng = Random(f"{self._split.value} {self._seed} {0 if worker is None else worker.id}")
        while True:
            yield training_pack(self._packer, rng, self._split, longest=int(self._longest))
