"""Who asks the engine over the fake model (`tests/hash_model.py`), for what, and what he must have heard in the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.hash_model import IMAGE, LOGITS, TALLY, VOCAB, keys_of, undisturbed
from wicore_backend.engine.request import Deadlines, Event, FinishedEvent, FinishReason, TokensEvent
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.processor.prompt import Prompt, PromptImage

STREAMS = np.random.default_rng(1).integers(2, VOCAB, (3, 48)).tolist()
"""What prompts begin with, so that many share a part."""
PICTURES = ((), (6,), (3, 8, 27))
"""Where each stream shows pictures; two of them side by side."""
NO_PIXELS = np.zeros((3, 1, 1), np.uint8)


def prompt_of(stream: int, length: int, picture: int, tail: int) -> Prompt:
    """The beginning of a stream, its pictures being the given one or another, and `tail` further tokens."""
    cut = next((start for start in PICTURES[stream] if start < length < start + IMAGE), length)
    images = tuple(
        PromptImage(start, IMAGE, NO_PIXELS, bytes([picture] * 16)) for start in PICTURES[stream] if start < cut
    )
    tokens = np.array([*STREAMS[stream][:cut], *range(2, 2 + tail)], np.int32)
    for image in images:
        tokens[image.start : image.end] = 0
    return Prompt(tokens, images)


@dataclass(eq=False)
class Caller:
    """Who asked, and what he has heard."""

    prompt: Prompt
    params: SamplingParams
    deadlines: Deadlines
    raises: bool
    tenant: str = ""
    id: str = ""
    twice: bool = False
    """Whether its id was another one's."""
    events: list[Event] = field(default_factory=list)

    def sink(self, event: Event) -> None:
        self.events.append(event)
        if self.raises:
            raise ValueError("a sink that fails")

    @property
    def last(self) -> FinishedEvent | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], FinishedEvent) else None

    def answers(self) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(self.params.n)]
        for event in self.events:
            if isinstance(event, TokensEvent):
                answers[event.index] += event.token_ids
        return answers

    def check(self, *, blamed: bool) -> None:
        """The events of a request that has ended are what they should be."""
        last, answers = self.last, self.answers()
        assert last is not None, "no final event"
        assert sum(isinstance(event, FinishedEvent) for event in self.events) == 1, "two final events"
        whole = last.reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert whole == (last.error is None)
        assert last.reason is not FinishReason.ERROR or blamed or self.twice, "an error without a fault of its own"
        if last.reason is FinishReason.REJECTED:
            assert last.usage.queue_s is None, "rejected, but it ran"
        if "before the first step" in str(last.error):
            assert last.usage.queue_s is None, "it missed its queue deadline, but it ran"
        if last.usage.ttft_s is not None:
            assert last.usage.queue_s is not None
            assert 0 <= last.usage.queue_s <= last.usage.ttft_s <= last.usage.total_s
        expected = [undisturbed(self.prompt, self.params, self.tenant, index) for index in range(self.params.answers)]
        if whole:
            assert last.reason is expected[0].reason
            if self.params.best_of:
                expected = sorted(expected, key=lambda a: a.likelihood, reverse=True)[: self.params.n]
            assert answers == [answer.tokens for answer in expected]
        elif self.params.best_of:
            assert all(any(a == e.tokens[: len(a)] for e in expected) for a in answers)
        else:
            assert all(a == e.tokens[: len(a)] for a, e in zip(answers, expected, strict=True))
        if self.params.prompt_logprobs is not None:
            for index, answer in enumerate(answers):
                self._check_prompt_logprobs(index, wanted=bool(answer))
        TALLY[f"ended: {last.reason}"] += 1

    def _check_prompt_logprobs(self, index: int, *, wanted: bool) -> None:
        told = [e for e in self.events if isinstance(e, TokensEvent) and e.index == index and e.prompt_logprobs]
        assert len(told) == wanted
        if not told:
            return
        logprobs, ids = told[0].prompt_logprobs, self.prompt.token_ids.tolist()
        keys = keys_of(ids, self.prompt.images, self.tenant, [])
        assert logprobs is not None
        assert [p and p.token_id for p in logprobs] == [None, *ids[1:]]
        expected = [float(LOGITS[key % len(LOGITS)].log_softmax(-1)[t]) for key, t in zip(keys, ids[1:], strict=False)]
        assert [p.logprob for p in logprobs if p] == pytest.approx(expected, abs=1e-4)
