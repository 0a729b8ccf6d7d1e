"""What travels between a client, the models of the repository and back: tensors, their names, and a request's options.

Nothing here imports Triton, so that it is tested without a server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from wicore_backend.engine.request import Deadlines, PriorityClass, Retention, TokenLogprob, Usage
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.processor import PromptSource
from wicore_backend.processor.prompt import Prompt, PromptImage
from wicore_backend.settings import Settings, parse_json

Tensors = Mapping[str, NDArray[Any]]

_LONGEST_WAY_S = 60.0
"""The longest that a request is believed to have been on its way to the model: a client that makes its arrival up gains
no more than this."""


def _priority(value: object) -> object:
    try:
        return PriorityClass.parse(value) if isinstance(value, str) else value
    except InvalidArgumentError as error:
        raise ValueError(str(error)) from None


Milliseconds = Annotated[int, Field(ge=1, le=10**9)]


class ServingOptions(Settings):
    """What a request can ask for beside sampling."""

    stream: bool = False
    """Many responses, each with what is new, instead of one with everything."""

    raw: bool = False
    """Take `text_input` as it is, without the chat template."""

    priority: Annotated[int, Field(ge=-100, le=100), BeforeValidator(_priority)] = PriorityClass.INTERACTIVE
    """Smaller goes first. `realtime`, `interactive` and `batch` are names for -10, 0 and 10."""

    tenant: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.:@/+-]*$")] = ""
    """On whose account the request runs: tenants who compete get equal service, and share no cached prefix. The server
    believes it; who must not choose it needs a proxy in between that sets it."""

    queue_deadline_ms: Milliseconds | None = None
    """Time from the request's arrival to its first step; one that waits longer is refused."""

    first_token_deadline_ms: Milliseconds | None = None
    """Time from the request's arrival to the first token; one that cannot make it is refused early."""

    deadline_ms: Milliseconds | None = None
    """Time from the request's arrival after which it ends, with what it has produced."""

    retain_seconds: Annotated[float, Field(ge=0, le=10**6)] | None = None
    """For so long the prompt's cached blocks are to leave host memory and disk after all others, as far as there is
    room for such wishes."""

    session_end: bool = False
    """No request follows this one, so that its cached blocks may leave first."""

    @property
    def retention(self) -> Retention:
        """The wishes about the cache."""
        return Retention(self.retain_seconds, self.session_end)

    @property
    def deadlines(self) -> Deadlines:
        """The deadlines, in seconds."""

        def seconds(milliseconds: int | None) -> float | None:
            return None if milliseconds is None else milliseconds / 1000

        return Deadlines(
            queue_s=seconds(self.queue_deadline_ms),
            first_token_s=seconds(self.first_token_deadline_ms),
            total_s=seconds(self.deadline_ms),
        )


class RequestOptions:
    """A request's serving options and sampling parameters, out of one flat set of names.

    Raises
    ------
    InvalidArgumentError
        Naming each unknown name and each value of a wrong type or out of range.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        unknown = values.keys() - ServingOptions.model_fields.keys() - SamplingParams.model_fields.keys()
        if unknown:
            known = sorted({*ServingOptions.model_fields, *SamplingParams.model_fields})
            named = ", ".join(map(repr, sorted(unknown)))
            named = named if len(named) <= 200 else f"{named[:197]}..."
            raise InvalidArgumentError(f"{named} is not a parameter; there are: {', '.join(known)}")
        self.values = dict(values)
        self.serving = ServingOptions(**{k: v for k, v in values.items() if k in ServingOptions.model_fields})
        self.sampling = SamplingParams(**{k: v for k, v in values.items() if k in SamplingParams.model_fields})

    @classmethod
    def parse(cls, parameters: str, tensors: Tensors, *, json_tensor: str) -> RequestOptions:
        """Options of a request.

        Parameters
        ----------
        parameters
            Triton's request parameters as the backend gives them, a JSON object; these win. The server's own are
            left out.
        tensors
            The request's inputs; `stream` and `stop` among them are options of those names.
        json_tensor
            The input that holds options as a JSON object.
        """
        values: dict[str, Any] = {}
        if json_tensor in tensors:
            values = parse_json(tensors[json_tensor].item(), json_tensor)
            if not isinstance(values, dict):
                raise InvalidArgumentError(f"{json_tensor} must be a JSON object, not {json.dumps(values)[:80]}")
        if "stream" in tensors:
            values["stream"] = bool(tensors["stream"].item())
        if "stop" in tensors:
            values["stop"] = [_text(value, "stop") for value in tensors["stop"]]
        given = json.loads(parameters or "{}")
        return cls(values | {name: value for name, value in given.items() if not _is_tritons(name)})


def _is_tritons(name: str) -> bool:
    """Whether a request parameter is the server's own: `generate` passes a request's id on as one, for example."""
    return name.startswith(("triton_", "sequence_")) or name == "id"


def prompt_source(tensors: Tensors) -> PromptSource:
    """What the client asks: `text_input` or `messages`, as the processor takes it.

    Raises
    ------
    InvalidArgumentError
        If neither or both are there, or the text is not UTF-8, or the messages are not a JSON list.
    """
    given = [name for name in ("text_input", "messages") if name in tensors]
    if len(given) != 1:
        raise InvalidArgumentError(f"give text_input or messages, one of them; the request has {given or 'neither'}")
    (name,) = given
    if tensors[name].size != 1:
        raise InvalidArgumentError(f"{name} takes one value, not {tensors[name].size}")
    text = _text(tensors[name].item(), name)
    if name == "text_input":
        return text
    messages = parse_json(text, "messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidArgumentError("messages must be a JSON list of objects with 'role' and 'content'")
    return messages


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{name} is not UTF-8: {error}") from None


def prompt_to_tensors(prompt: Prompt, image_size: int) -> dict[str, NDArray[Any]]:
    """The tensors that carry a Prompt from the preprocessor to the model; those of the images may have 0 rows."""
    images = prompt.images
    return {
        "input_ids": prompt.token_ids,
        "pixels": np.stack([i.pixels for i in images])
        if images
        else np.zeros((0, 3, image_size, image_size), np.uint8),
        "image_spans": np.array([(i.start, i.length) for i in images], np.int32).reshape(-1, 2),
        "image_digests": np.frombuffer(b"".join(i.digest for i in images), np.uint8).reshape(-1, 16),
    }


def prompt_from_tensors(tensors: Tensors, image_size: int | None) -> Prompt:
    """The Prompt in the model's input tensors, which a client may have made itself.

    Raises
    ------
    InvalidArgumentError
        If there are no ids, or the images' tensors do not fit one another or the ids.
    """
    if "input_ids" not in tensors:
        raise InvalidArgumentError("the request has no input_ids; send the prompt's token ids, INT32 [T]")
    ids = tensors["input_ids"]
    pixels, spans, digests = (tensors.get(name) for name in ("pixels", "image_spans", "image_digests"))
    if pixels is None or len(pixels) == 0:
        for name, given in (("image_spans", spans), ("image_digests", digests)):
            if given is not None and len(given):
                raise InvalidArgumentError(f"{name} is {list(given.shape)}, and there are no pixels; send all three")
        return Prompt(ids)
    count = len(pixels)
    if pixels.shape != (count, 3, image_size, image_size):
        raise InvalidArgumentError(
            f"pixels is {list(pixels.shape)}; this model takes [N, 3, {image_size}, {image_size}]"
        )
    if spans is None or spans.shape != (count, 2) or digests is None or digests.shape != (count, 16):
        raise InvalidArgumentError(f"{count} images need image_spans [{count}, 2] and image_digests [{count}, 16]")
    images = [
        PromptImage(int(start), int(length), pixels[i], digests[i].tobytes()) for i, (start, length) in enumerate(spans)
    ]
    for before, after in zip([None, *images], images, strict=False):
        if after.start < (before.end if before else 0) or after.length < 1 or after.end > len(ids):
            raise InvalidArgumentError(
                f"image_spans {spans.tolist()} must be ordered, apart and inside the {len(ids)} input_ids"
            )
    return Prompt(ids, tuple(images))


def arrival_of(tensors: Tensors, now: float) -> float:
    """When the request came, as the preprocessor's `time.monotonic` had it; `now` without a preprocessor.

    Raises
    ------
    InvalidArgumentError
        If `arrival` is not one finite number.
    """
    if "arrival" not in tensors:
        return now
    values = tensors["arrival"].tolist()
    if len(values) != 1 or not math.isfinite(values[0]):
        raise InvalidArgumentError("arrival is what the preprocessor says; leave it out")
    return min(now, max(now - _LONGEST_WAY_S, float(values[0])))


def usage_json(usage: Usage) -> str:
    """The `usage` output: token counts, and times in milliseconds."""

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 3)

    return json.dumps(
        {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "queue_ms": milliseconds(usage.queue_s),
            "ttft_ms": milliseconds(usage.ttft_s),
            "total_ms": milliseconds(usage.total_s),
        }
    )


def logprobs_content(
    logprobs: Iterable[TokenLogprob],
    prompt_logprobs: Iterable[TokenLogprob | None] | None,
    token_text: Callable[[int], str],
) -> dict[str, Any]:
    """The `logprobs` output: {"tokens": [...], "prompt": [...]}, each entry a token's id, text and alternatives."""

    def entry(logprob: TokenLogprob | None) -> dict[str, Any] | None:
        if logprob is None:
            return None
        top = [{"token_id": t, "token": token_text(t), "logprob": value} for t, value in logprob.top]
        token = logprob.token_id
        return {"token_id": token, "token": token_text(token), "logprob": logprob.logprob, "top": top}

    content: dict[str, Any] = {"tokens": [entry(logprob) for logprob in logprobs]}
    if prompt_logprobs is not None:
        content["prompt"] = [entry(logprob) for logprob in prompt_logprobs]
    return content
