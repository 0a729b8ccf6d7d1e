"""What comes back: chunks, completions, health and statistics; and how responses of the wire add up to an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from wicore_client.errors import ServerError, WicoreClientError, error_from_code

FinishReason = Literal["stop", "length"]
"""Why a whole answer ended: the model's own end or a stop text, or max_tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and the most likely alternatives at its place, best first."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        return cls(
            token_id=entry["token_id"],
            token=entry["token"],
            logprob=entry["logprob"],
            top=tuple(cls.from_json(alternative) for alternative in entry.get("top", ())),
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took, by the server's clock; a time is None where the request ended before."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those that the server had computed before."""
    queue_ms: float | None = None
    ttft_ms: float | None = None
    """Time to the first token."""
    total_ms: float | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(
            prompt_tokens=values["prompt_tokens"],
            completion_tokens=values["completion_tokens"],
            cached_tokens=values.get("cached_tokens", 0),
            queue_ms=values.get("queue_ms"),
            ttft_ms=values.get("ttft_ms"),
            total_ms=values.get("total_ms"),
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one response adds to an answer; the last one has `finish_reason` and `usage`."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    """Which answer it belongs to, if several are asked for."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """With the first chunk, if asked for; None for the first token of the prompt."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of several answers to a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; the first, if there are several."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    answers: tuple[Alternative, ...] = ()
    """All of them, with `n` > 1."""


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """A model of the server's repository. `state` is Triton's word, `reason` says why it is not READY."""

    name: str
    version: str
    state: str
    reason: str

    @property
    def ready(self) -> bool:
        return self.state == "READY"


_TROUBLE = "wicore_health_"


@dataclass(frozen=True, slots=True)
class Health:
    """The server's state. `ready` means that it takes requests for the client's model."""

    live: bool
    ready: bool
    server: str
    """Name and version."""
    models: tuple[ModelHealth, ...]

    @classmethod
    def of(cls, live: bool, server: str, models: tuple[ModelHealth, ...], model: str) -> Self:
        # An engine in trouble shows itself by a model that is not ready: Triton calls its own one ready all along.
        ill = any(m.name.startswith(_TROUBLE) and not m.ready for m in models)
        return cls(live, live and not ill and any(m.name == model and m.ready for m in models), server, models)


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """What Triton counted for a model since it was loaded. Times are means for one request, in milliseconds."""

    name: str
    version: str
    succeeded: int
    failed: int
    executions: int
    queue_ms: float
    compute_ms: float

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """From an entry of `model_stats` in Triton's statistics extension (gRPC's form has the same names)."""
        stats = entry.get("inference_stats", {})

        def count(name: str) -> int:
            return int(stats.get(name, {}).get("count", 0))

        def mean_ms(name: str) -> float:
            return int(stats.get(name, {}).get("ns", 0)) / max(1, count(name)) / 1e6

        return cls(
            name=entry["name"],
            version=str(entry.get("version", "")),
            succeeded=count("success"),
            failed=count("fail"),
            executions=int(entry.get("execution_count", 0)),
            queue_ms=mean_ms("queue"),
            compute_ms=mean_ms("compute_infer"),
        )


@dataclass(frozen=True, slots=True)
class Metric:
    """One sample of the server's Prometheus page."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Triton's statistics of every model, and Wicore's own metrics (empty if the client has no metrics port)."""

    models: tuple[ModelStatistics, ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """One response as the wire has it, whichever the protocol."""

    text_output: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    error_code: str = ""
    error_message: str = ""
    usage: str = ""
    logprobs: str = ""
    index: int = 0
    answers: str = ""


class Answer:
    """The sum of the responses so far. It is *empty* until the first token, and *whole* after a last response that is
    not an error. Where there are several answers, `text` and `token_ids` are those of the first."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._alternatives: tuple[Alternative, ...] = ()

    @property
    def empty(self) -> bool:
        return not any(chunk.text or chunk.token_ids for chunk in self._chunks)

    @property
    def whole(self) -> bool:
        return bool(self._chunks) and self._chunks[-1].finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self._chunks if chunk.index == 0)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self._chunks if chunk.index == 0 for token in chunk.token_ids)

    def accept(self, response: Response) -> Chunk:
        """Add a response.

        Raises
        ------
        WicoreClientError
            What the response says, if it is the last one of an answer that is not whole.
        """
        try:
            logprobs = json.loads(response.logprobs) if response.logprobs else {}
            finish_reason = _finish_reason(response)
            if finish_reason is not None and not response.usage:
                raise ValueError("the last response has no usage")
            chunk = Chunk(
                text=response.text_output,
                token_ids=response.token_ids,
                index=response.index,
                logprobs=tuple(map(TokenLogprob.from_json, logprobs.get("tokens", ()))),
                prompt_logprobs=tuple(entry and TokenLogprob.from_json(entry) for entry in logprobs.get("prompt", ())),
                finish_reason=finish_reason,
                usage=Usage.from_json(json.loads(response.usage)) if response.usage else None,
            )
            if response.answers and finish_reason is not None:
                self._alternatives = tuple(map(self._alternative, json.loads(response.answers)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.interrupted(
                ServerError(f"cannot read the server's response ({error!r}); are client and server of one version?")
            ) from error
        self._chunks.append(chunk)
        if response.error_code or (chunk.finish_reason is None and response.finish_reason):
            code = response.error_code or {"deadline": "deadline_exceeded"}.get(
                response.finish_reason, response.finish_reason
            )
            raise self.interrupted(error_from_code(code, response.error_message))
        return chunk

    def interrupted(self, error: WicoreClientError) -> WicoreClientError:
        """`error`, with what there is of the answer."""
        error.partial_text = self.text
        error.partial_token_ids = self.token_ids
        return error

    def completion(self) -> Completion:
        """The whole answer."""
        last = self._chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return Completion(
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=last.finish_reason,
            usage=last.usage,
            logprobs=tuple(entry for chunk in self._chunks if chunk.index == 0 for entry in chunk.logprobs),
            prompt_logprobs=tuple(
                entry for chunk in self._chunks if chunk.index == 0 for entry in chunk.prompt_logprobs
            ),
            answers=self._alternatives,
        )

    def _alternative(self, entry: Mapping[str, Any]) -> Alternative:
        """One of several answers: what came of it before, and what the last response adds."""
        before = [chunk for chunk in self._chunks if chunk.index == entry["index"]]
        finish_reason = _FINISH_REASONS[entry["finish_reason"]]
        logprobs = entry.get("logprobs", {}).get("tokens", ())
        return Alternative(
            index=entry["index"],
            text="".join(chunk.text for chunk in before) + entry["text"],
            token_ids=(*(token for chunk in before for token in chunk.token_ids), *entry["token_ids"]),
            finish_reason=finish_reason,
            logprobs=(
                *(logprob for chunk in before for logprob in chunk.logprobs),
                *map(TokenLogprob.from_json, logprobs),
            ),
        )


_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}


def _finish_reason(response: Response) -> FinishReason | None:
    return None if response.error_code else _FINISH_REASONS.get(response.finish_reason)
