"""How one request's tokens are chosen and when its answer ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.settings import Settings, parse_json

Penalty = Annotated[float, Field(ge=-2, le=2)]
Token = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _grammar(value: Any) -> Any:
    """A grammar as its fields, or those as JSON, which is what a parameter of a Triton request can carry."""
    return _object(value, "grammar")


def _biases(value: Any) -> Any:
    """Token ids are texts in JSON; the same one in two spellings is refused."""
    value = _object(value, "logit_bias")
    if not isinstance(value, dict):
        return value
    biases: dict[Any, Any] = {}
    for name, bias in value.items():
        token = int(name) if isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 12 else name
        if token in biases:
            raise ValueError(f"token {token} is there twice")
        biases[token] = bias
    return biases


def _object(value: Any, name: str) -> Any:
    try:
        return parse_json(value, name) if isinstance(value, str) else value
    except InvalidArgumentError as error:
        raise ValueError(str(error)) from None


class SamplingParams(Settings):
    """Sampling and stopping of one request.

    A token is chosen from the logits after, in this order: repetition penalty (over prompt and answer), presence and
    frequency penalty (over the answer), logit_bias, grammar, temperature, top_k, top_p, min_p. Logprobs are of the
    model's own distribution, before any of these.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; None goes on to the end of the context."""

    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Before so many tokens none is chosen that ends the answer. A stop text, or a grammar that is complete, ends it
    all the same."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 takes the most likely token."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Choose among the k most likely tokens; 0 is all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the fewest most likely tokens whose probabilities reach top_p together."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Choose among tokens at least min_p times as probable as the most likely one."""

    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides positive and multiplies negative logits of tokens seen in the prompt or the answer; 1 is none."""

    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens in the answer."""

    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit for each time it stands in the answer."""

    logit_bias: Annotated[dict[Token, Bias], BeforeValidator(_biases), Field(max_length=1024)] = Field(
        default_factory=dict
    )
    """Added to the logits of these tokens: -100 as good as rules a token out, 100 leaves hardly any other."""

    grammar: Annotated[Grammar | None, BeforeValidator(_grammar)] = None
    """The form of the answer, kept by choosing among the tokens that it allows. The answer ends as soon as nothing
    can follow, and not before the grammar lets it, unless a stop text or max_tokens cut it short."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The same seed, prompt and settings give the same answer; None draws a seed."""

    n: Annotated[int, Field(ge=1, le=64)] = 1
    """How many answers; their prompt is computed once."""

    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    """How many answers to make, of which the `n` likeliest by mean log-probability are given, when all have ended."""

    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)] = ()
    """Texts that end the answer and do not appear in it: one, or a list."""

    stop_token_ids: Annotated[tuple[Token, ...], Field(max_length=64)] = ()
    """Tokens that end the answer, beside the model's own."""

    ignore_eos: bool = False
    """Go on after the model's own end-of-answer tokens."""

    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report each token's log-probability and those of this many alternatives."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """The same for the prompt's tokens."""

    @model_validator(mode="after")
    def _in_proportion(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, less than n = {self.n}; it is the larger of the two")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens = {self.max_tokens}")
        if self.grammar is not None and self.ignore_eos:
            raise ValueError("ignore_eos does not go with a grammar, which says where an answer ends; use min_tokens")
        return self

    @property
    def answers(self) -> int:
        """How many are made."""
        return self.best_of or self.n

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many_texts(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _list_of_tokens(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def completed(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These parameters, with those that were not given taken from `defaults` (`generation_defaults`)."""
        missing = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return self.model_copy(update=missing) if missing else self


def generation_defaults(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json says of sampling, in the names of SamplingParams.

    Raises
    ------
    CheckpointError
        If the file is not JSON or has a value that SamplingParams refuses.
    """
    path = checkpoint / "generation_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
        if not config.get("do_sample", False):
            return {"temperature": 0.0}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {"temperature": 1.0} | {name: config[name] for name in names if config.get(name) is not None}
        return SamplingParams(**given).model_dump(include=set(given))
    except (ValueError, AttributeError, InvalidArgumentError) as error:
        raise CheckpointError(f"{path}: {error}") from None
