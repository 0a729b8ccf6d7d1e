"""Random JSON Schemas through the engine: an answer that is whole is valid, and what cannot be kept is refused by name.

`python -m tests.test_structured_schemas` runs 500 at three temperatures, CI a few of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

from tests.random_schemas import random_schemas
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
TOKENIZER = Tokenizer.from_checkpoint(MODEL)
TOGETHER = 32
"""Answers that the engine makes at once."""


@dataclass
class Outcome:
    """What became of the schemas."""

    whole: int = 0
    cut: int = 0
    invalid: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """By what was said."""


def run(engine: Engine, schemas: list[Any], *, temperature: float, max_tokens: int) -> Outcome:
    """Ask for an answer by each schema."""
    outcome = Outcome()
    for first in range(0, len(schemas), TOGETHER):
        streams = []
        for seed, schema in enumerate(schemas[first : first + TOGETHER], start=first):
            grammar: Any = {"json_schema": schema}
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, grammar=grammar)
            try:
                streams.append((schema, engine.stream("Describe this picture.", params)))
            except InvalidArgumentError as error:
                outcome.refused[str(error)] += 1
        for schema, stream in streams:
            result = stream.collect()
            if result.finish_reason == "length":
                outcome.cut += 1
                continue
            outcome.whole += 1
            if fault := fault_of(result.text, schema):
                outcome.invalid.append(f"{json.dumps(schema)}: {result.text!r}: {fault}")
    return outcome


def fault_of(text: str, schema: Any) -> str | None:
    """What is wrong with an answer; None if it is valid."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).partition("\n")[0]
    return None


@pytest.fixture(scope="module")
def engine():
    with Engine(EngineConfig(model=MODEL, device="cpu", dtype="float32")) as engine:
        yield engine


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 1), (1.0, 2), (50.0, 3)])
def test_answers_are_valid_by_random_schemas(engine, temperature, seed):
    outcome = run(engine, random_schemas(40, seed=seed), temperature=temperature, max_tokens=120)
    assert not outcome.invalid
    assert outcome.whole >= 15
    assert outcome.refused
    for said in outcome.refused:
        assert said.startswith("grammar"), said
        assert len(said) < 700, said


def test_what_is_not_valid_is_noticed():
    assert fault_of('{"a": 1}', {"properties": {"a": {"type": "string"}}})
    assert fault_of('{"a": ', {})
    assert fault_of('"2026-13-01"', {"format": "date"})


PLAIN = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 2, "maxLength": 9},
        "count": {"type": "integer", "minimum": -70, "maximum": 700, "multipleOf": 7},
        "kind": {"enum": ["a", 'b"\n', None, 3, [1, {"x": 2}]]},
        "list": {"type": "array", "items": {"type": ["boolean", "null"]}, "maxItems": 3},
        "choice": {
            "anyOf": [{"type": "string", "pattern": "^[a-f]{2}$"}, {"type": "array", "items": {"type": "string"}}]
        },
    },
    "required": ["text", "count"],
    "additionalProperties": False,
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_valid_is_allowed(matchers, data):
    """A grammar that allows too little keeps every promise above."""
    value = {
        name: data.draw(from_schema(schema))  # Of objects it cannot make any with this version of hypothesis.
        for name, schema in PLAIN["properties"].items()
        if name in PLAIN["required"] or data.draw(st.booleans())
    }
    text = json.dumps(value, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 1, 4])))
    assume("\\u" not in text and "\x7f" not in text and not any("\ud800" <= c <= "\udfff" for c in text))
    (answer,) = matchers.begin(Grammar(json_schema=PLAIN), 1)
    for token in TOKENIZER.encode(text):
        answer.accept(token)
    assert answer.complete


@pytest.fixture(scope="module")
def matchers():
    return GrammarCompiler(TOKENIZER, vocab_size=2048, eos_token_ids={1, 6})


def main() -> int:
    """The whole proof; returns the exit code."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300)
    given = parser.parse_args()
    failed = False
    with Engine(EngineConfig(model=MODEL, device="cpu", dtype="float32")) as engine:
        schemas = random_schemas(given.schemas, seed=given.seed)
        for temperature in (0.0, 1.0, 50.0):
            outcome = run(engine, schemas, temperature=temperature, max_tokens=given.max_tokens)
            refused = sum(outcome.refused.values())
            print(
                f"temperature {temperature:g}: of {len(schemas)} schemas {refused} refused by name, "
                f"{outcome.whole} answers whole, of these {len(outcome.invalid)} invalid; {outcome.cut} cut by length"
            )
            print(*outcome.invalid, sep="\n", end="\n" if outcome.invalid else "")
            failed |= bool(outcome.invalid)
        for said, count in outcome.refused.most_common(12):
            print(f"{count:4} {said[:100]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
