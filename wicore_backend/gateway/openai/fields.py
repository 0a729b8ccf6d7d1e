"""Fields that OpenAI's requests have in common, and what becomes of each on the wire.

No field is ignored in silence. It is honoured; or it is refused by name, also when only some of its values are; or it
promises nothing about the answer, and then its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import InvalidRequestError

MOST_BIASES = 1024
MOST_PARTS = 4096

REFUSED = "unsupported"
"""pydantic's type of the problem that a field is known and refused."""


class Body(BaseModel):
    """A request's body: unknown fields and wrong types are errors, null is a field that is left out.

    A problem costs pydantic 20 us and a kilobyte, and the client is told the first: a body of millions of them would
    hold up everybody. So long lists are declared with `fail_fast`, and dicts are counted before (`counted`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_one_of_many_names(cls, value: Any) -> Any:
        known = cls.model_fields
        if not isinstance(value, dict) or len(value) <= len(known):
            return value
        unknown = next(name for name in value if name not in known)
        return {name: value[name] for name in (*known, unknown) if name in value}


def counted(most: int) -> BeforeValidator:
    """Refuses a dict of more entries before it looks at them, as pydantic's `max_length` does with lists."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "too_long", "there are {count} entries; {most} are taken", {"count": len(value), "most": most}
            )
        return value

    return BeforeValidator(check)


def _check_parts(messages: Any) -> Any:
    if isinstance(messages, list):
        lists = (value for m in messages if isinstance(m, dict) for value in m.values() if isinstance(value, list))
        if (count := sum(map(len, lists))) > MOST_PARTS:
            raise PydanticCustomError(
                "too_long",
                "there are {count} parts in all messages; {most} are taken",
                {"count": count, "most": MOST_PARTS},
            )
    return messages


few_parts = BeforeValidator(_check_parts)
"""Counts what all messages together consist of before it is looked at: a million parts take a minute to read."""


def refused(why: str, *harmless: Any) -> Any:
    """The type of a field that is refused, unless it is null or one of the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(value is h or (type(value) is type(h) and value == h) for h in harmless):
            return value
        raise PydanticCustomError(REFUSED, "{why}", {"why": why})

    schema = WithJsonSchema({"enum": [None, *harmless], "description": f"Refused: {why}."})
    return Annotated[Any, BeforeValidator(check), schema]


def _wire_seed(seed: int) -> int:
    return seed & (2**63 - 1)


Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Milliseconds = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(_wire_seed)]
PriorityName = Literal["realtime", "interactive", "batch"]

_PRIORITIES: dict[str, int] = {"realtime": -10, "interactive": 0, "batch": 10}
_DAY_S = 86_400.0


class WicoreFields(Body):
    """What Wicore has and OpenAI does not (`extra_body` in its client)."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | PriorityName | None = None
    """Smaller goes first; never before the caller's own class."""
    queue_deadline_ms: Milliseconds | None = None
    first_token_deadline_ms: Milliseconds | None = None
    deadline_ms: Milliseconds | None = None
    retain_seconds: Annotated[float, Field(ge=0, le=10**6)] | None = None
    session_end: bool | None = None

    def wicore_options(self, caller: Caller) -> dict[str, Any]:
        """Their form on the wire, with what the caller may not choose himself."""
        options = {name: value for name in WicoreFields.model_fields if (value := getattr(self, name)) is not None}
        priority = self.priority if self.priority is not None else caller.default_priority
        number = _PRIORITIES[priority] if isinstance(priority, str) else priority
        options["priority"] = max(number, caller.priority)
        if caller.tenant:
            options["tenant"] = caller.tenant
        return options


class BookkeepingFields(Body):
    """Fields that say something about the request and promise nothing about its answer."""

    user: Annotated[str, Field(max_length=512)] | None = None
    """Whose request it is, for the sender's own books: Wicore tells users apart by their keys."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """The same."""
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16), counted(16)] | None = (
        None
    )
    """For answers that are stored, and none is."""
    store: refused("answers are not stored", False) = None  # type: ignore[valid-type]
    service_tier: refused("there is one tier; `priority` chooses a class", "auto", "default") = None  # type: ignore[valid-type]
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    """Which prompts begin alike, for servers that have to be told: Wicore finds that out."""
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    """`24h` asks to keep the prompt's cached blocks for a day (`retain_seconds`)."""
    prompt_cache_options: refused("use `retain_seconds`") = None  # type: ignore[valid-type]
    moderation: refused("there is no moderation") = None  # type: ignore[valid-type]


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool | None = None
    """One more chunk at the end, with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The tokens so far in each chunk (of Wicore's; other servers have it under the same name)."""
    include_obfuscation: refused("chunks are not padded", False) = None  # type: ignore[valid-type]


class SamplingFields(WicoreFields):
    """Sampling and stopping, as chat and text completions have them in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES), counted(MOST_BIASES)
        ]
        | None
    ) = None
    """By token id."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling_options(self, caller: Caller) -> dict[str, Any]:
        """Their form on the wire."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options goes with stream = true", param="stream_options")
        names = ("temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop:
            options["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.logit_bias:
            options["logit_bias"] = _checked_bias(self.logit_bias)
        return options | self.wicore_options(caller)


def retention(fields: BookkeepingFields) -> dict[str, Any]:
    """What `prompt_cache_retention` is on the wire."""
    return {"retain_seconds": _DAY_S} if fields.prompt_cache_retention == "24h" else {}


def _checked_bias(bias: dict[str, float]) -> dict[str, float]:
    wrong: Iterable[str] = (name for name in bias if not (name.isascii() and name.isdigit() and len(name) <= 9))
    for name in wrong:
        raise InvalidRequestError(f"logit_bias has {ascii(name)[:40]}, which is no token id", param="logit_bias")
    return bias
