"""Whole answers and streams of events for callers in the engine's own process, whose prompts are not processed yet."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, overload

import numpy as np

from wicore_backend.engine.request import Sink
from wicore_backend.engine.results import EventStream, Result
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.processor import ImageSource, Processor, PromptSource
from wicore_backend.processor.prompt import Prompt

Images = list[ImageSource]


class Submit(Protocol):
    """`Engine.submit`, as far as it is needed here."""

    def __call__(self, prompt: Prompt, params: SamplingParams, *, sink: Sink, request_id: str) -> object: ...


class InProcess:
    """Processes prompts on the caller's thread, submits them, and reads events from a queue.

    Parameters
    ----------
    cancel
        Ends the request with an id.
    """

    def __init__(self, processor: Processor, *, submit: Submit, cancel: Callable[[str], None]) -> None:
        self._processor = processor
        self._submit = submit
        self._cancel = cancel

    @overload
    def generate(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        raw: bool = False,
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | None = None,
        *,
        images: list[Images] | None = None,
        raw: bool = False,
    ) -> list[Result]: ...

    @overload
    def generate(
        self,
        prompt: PromptSource | list[PromptSource],
        params: SamplingParams | None = None,
        *,
        images: Images | list[Images] | None = None,
        raw: bool = False,
    ) -> Result | list[Result]: ...

    def generate(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        images: Any = None,
        raw: bool = False,
    ) -> Result | list[Result]:
        """Answer one prompt, or a list of them together.

        Parameters
        ----------
        prompt
            A question as text, chat messages, or token ids; or a list of such prompts.
        images
            The prompt's images; for a list of prompts, a list for each.
        raw
            Take text as it is, without the chat template.

        Returns
        -------
        A Result for one prompt, a list of them for a list.

        Raises
        ------
        WicoreError
            The first error of any of the prompts; the others are then cancelled.
        """
        if not _is_many(prompt):
            with self.stream(prompt, params, images=images, raw=raw) as stream:
                return stream.collect()
        if images is not None and len(images) != len(prompt):
            raise InvalidArgumentError(f"{len(prompt)} prompts came with {len(images)} lists of images")
        with ExitStack() as closing:
            streams = [
                closing.enter_context(self.stream(p, params, images=i, raw=raw))
                for p, i in zip(prompt, images or [None] * len(prompt), strict=True)
            ]
            return [stream.collect() for stream in streams]

    def stream(
        self,
        prompt: PromptSource,
        params: SamplingParams | None = None,
        *,
        images: Images | None = None,
        raw: bool = False,
    ) -> EventStream:
        """Queue one prompt, as for `generate`, and return its events as they come; the last is a FinishedEvent."""
        processed = self._processor.process(prompt, images=images or (), raw=raw)
        request_id = secrets.token_hex(8)
        stream = EventStream(partial(self._cancel, request_id))
        self._submit(processed, params or SamplingParams(), sink=stream.put, request_id=request_id)
        return stream


def _is_many(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts: not a text, nor one prompt's chat messages or token ids."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], Mapping | int | np.integer)
