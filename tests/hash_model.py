"""A fake model that makes every mistake of the books visible, and the memory below it.

A key is the hash of all that a real key depends on: the tokens and pictures up to it. Memory remembers, for every block
of either group, which keys were written where, and each step checks that each key that its tokens may see is the one
that its sequence should have there. The next token is drawn from logits that follow from that hash, so that answers can
be told without an engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import FinishReason, Request, Sequence
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.sampler import SamplingRow, sample
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.transfers import Route, Transfer
from wicore_backend.processor.prompt import Prompt, PromptImage

CONTEXT, VOCAB, IMAGE, EOS = 64, 24, 5, 1
LOGITS = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (997, VOCAB)).astype(np.float32))

TALLY: Counter[str] = Counter()
"""What happened, over all interleavings."""


# What it says


def keys_of(tokens: Rows[int], images: Iterable[PromptImage], tenant: str, keys: list[int]) -> list[int]:
    """Extend `keys`, those of the first tokens, to all of them. A picture's tokens see each other.

    Each tenant has keys of its own, so that a block that two of them share is noticed.
    """
    pictures = {image.start: image for image in images}
    while len(keys) < len(tokens):
        place, before = len(keys), keys[-1] if keys else len(tenant)
        if image := pictures.get(place):
            seen = hash((before, image.digest[0], *tokens[place : image.end]))
            keys += [hash((seen, offset)) for offset in range(image.length)]
        else:
            keys.append(hash((before, tokens[place])))
    return keys


@lru_cache(maxsize=2**16)
def next_token(key: int, temperature: float, seed: int, place: int) -> tuple[int, float]:
    """What the model says after the token of this key, and its log-probability."""
    logits = LOGITS[key % len(LOGITS)]
    row = SamplingRow(SamplingParams(temperature=temperature), seed, place)
    token = int(sample(logits[None].clone(), [row]).tokens)
    return token, float(logits.log_softmax(-1)[token])


def undisturbed(prompt: Prompt, params: SamplingParams, tenant: str, index: int) -> Answer:
    """The answer that the model gives if nothing else happens."""
    assert params.seed is not None
    stop = {*params.stop_token_ids} | ({EOS} if not params.ignore_eos else set())
    tokens, keys = prompt.token_ids.tolist(), list[int]()
    room = CONTEXT - len(prompt)
    answer = Answer([], FinishReason.LENGTH, 0.0)
    while len(answer.tokens) < min(params.max_tokens or room, room):
        key = keys_of(tokens, prompt.images, tenant, keys)[-1]
        token, logprob = next_token(key, params.temperature, params.seed + index, len(answer.tokens))
        answer.tokens.append(token)
        answer.logprob += logprob
        tokens.append(token)
        if token in stop:
            answer.reason = FinishReason.STOP
            break
    return answer


@dataclass
class Answer:
    tokens: list[int]
    reason: FinishReason
    logprob: float

    @property
    def likelihood(self) -> float:
        return self.logprob / len(self.tokens)


# What an engine runs it on


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Memory:
    """Stands in for the KV pools: the key at each offset of each block, None where there is none."""

    def __init__(self, layout: KVLayout, blocks: dict[LayerGroup, int], slots: int) -> None:
        self._size = layout.block_size
        self.host: dict[LayerGroup, list[list[int | None]]] = {g: [[] for _ in range(slots)] for g in layout.groups}
        self.keys: dict[LayerGroup, list[list[int | None]]] = {g: [[] for _ in range(blocks[g])] for g in layout.groups}
        self.clear()

    def apply(self, transfers: Iterable[Transfer]) -> None:
        ends = {
            Route.WITHIN_DEVICE: (self.keys, self.keys),
            Route.DEVICE_TO_HOST: (self.keys, self.host),
            Route.HOST_TO_DEVICE: (self.host, self.keys),
        }
        for transfer in transfers:
            TALLY[f"blocks copied {transfer.route.name.lower().replace('_', ' ')}"] += 1
            source, target = ends[transfer.route]
            target[transfer.group][transfer.target] = list(source[transfer.group][transfer.source])

    def clear(self) -> None:
        for blocks in self.keys.values():
            blocks[:] = [[None] * self._size for _ in blocks]

    def close(self) -> None:
        """There is nothing to give back."""


class Runner:
    """Stands in for the model. What it finds wrong goes into `wrong`: the engine would take an error for a fault."""

    def __init__(self, layout: KVLayout, memory: Memory, clock: Clock, *, max_tokens: int) -> None:
        self._layout, self._memory, self._clock, self._max_tokens = layout, memory, clock, max_tokens
        self._keys: dict[Sequence, list[int]] = {}
        self.wrong: list[str] = []
        self.broken: Callable[[StepPlan], bool] = lambda _: False
        self.meanwhile: Callable[[], None] = lambda: None

    def foresee(self, request: Request, computed: int) -> None:
        """Pictures are encoded with their step here."""
        del request, computed

    def forget(self, request: Request) -> None:
        """Nothing is encoded ahead."""
        del request

    def run(self, plan: StepPlan, ahead: torch.Tensor | None = None) -> StepOutput:
        self._ahead = ahead
        self._guesses = plan.guesses
        self._expect(not (plan.guesses and plan.chunks), "prompts beside guesses")
        chunks = plan.parts
        lengths = [c.end - c.start for c in chunks]
        self._clock.now += 0.001 + 0.0001 * sum(lengths)
        self.meanwhile()
        self._check_plan(chunks)
        broken = self.broken(plan)
        for chunk in chunks:
            self._write(chunk, garbage=broken)
        if broken:
            TALLY["runs of the model that failed"] += 1
            raise RuntimeError("the device is on fire")
        for chunk in chunks:
            self._check_visible(chunk)
        rows = [key % len(LOGITS) for c in chunks for key in self._keys_of(c.sequence)[c.start : c.end]]
        hidden, nothing = torch.tensor(rows), torch.empty(0)
        executor: Any = SimpleNamespace(last=lambda hidden, _, index: LOGITS[hidden[index]])
        return StepOutput(executor, hidden, nothing, tuple(np.cumsum([0, *lengths]).tolist()))

    def _keys_of(self, sequence: Sequence) -> list[int]:
        keys = self._keys.setdefault(sequence, [])
        tokens = sequence.tokens
        if sequence.ahead is not None:
            assert self._ahead is not None
            tokens = [*tokens, int(self._ahead[sequence.ahead])]
        if guess := self._guesses.get(sequence):  # Which may be wrong: their keys are not the sequence's yet.
            tokens, keys = [*tokens, *guess], list(keys)
        return keys_of(tokens, sequence.request.prompt.images, sequence.tenant, keys)

    def _check_plan(self, chunks: list[Chunk]) -> None:
        self._expect(chunks != [], "a step computes nothing")
        self._expect(len({c.sequence for c in chunks}) == len(chunks), "a sequence is twice in a step")
        self._expect(sum(c.end - c.start for c in chunks) <= self._max_tokens, "a step has too many tokens")
        for c in chunks:
            self._expect(c.start == c.sequence.computed, "a chunk does not go on where its sequence stands")
            beyond = c.sequence.uncomputed + len(self._guesses.get(c.sequence, ()))
            self._expect(c.start < c.end <= c.start + beyond, "a chunk is empty, or beyond its sequence")
            for image in c.sequence.request.prompt.images:
                self._expect(not (image.start < c.start < image.end or image.start < c.end < image.end), "a cut image")

    def _write(self, chunk: Chunk, *, garbage: bool) -> None:
        size, keys = self._layout.block_size, self._keys_of(chunk.sequence)
        for group, blocks in self._memory.keys.items():
            table = chunk.sequence.running_blocks.tables[group]
            for place in range(chunk.start, chunk.end):
                blocks[table[place // size]][place % size] = None if garbage else keys[place]

    def _check_visible(self, chunk: Chunk) -> None:
        size, keys = self._layout.block_size, self._keys_of(chunk.sequence)
        for group, blocks in self._memory.keys.items():
            table = chunk.sequence.running_blocks.tables[group]
            first = 0 if group is LayerGroup.GLOBAL else max(0, chunk.start - self._layout.window + 1)
            for index in range(first // size, self._layout.blocks_for(chunk.end)):
                places = slice(max(first, index * size), min(chunk.end, (index + 1) * size))
                there = blocks[table[index]][places.start - index * size : places.stop - index * size]
                self._expect(table[index] != 0, f"no {group} block where there should be one")
                self._expect(there == keys[places], f"a {group} block holds what is not the sequence's")

    def _expect(self, right: bool | np.bool_, said: str) -> None:
        if not right:
            self.wrong.append(said)
