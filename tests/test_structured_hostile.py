"""Grammars that mean harm: none ends the process, takes long to compile, or longer for a mask than a step may."""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from wicore_backend.engine.grammar import compiler as compiling
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.progress import allowed_tokens
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.errors import InvalidArgumentError, OverloadedError
from wicore_backend.processor.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
LARGEST = 125_000
"""Characters: what is let through."""


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(Tokenizer.from_checkpoint(MODEL), vocab_size=2048, eos_token_ids={1, 6})


def chain(link, end):
    """As many references, each to the next, as fit."""
    defs, size = {}, 0
    while size < LARGEST:
        defs[f"{len(defs):x}"] = link({"$ref": f"#/$defs/{len(defs) + 1:x}"})
        size += len(json.dumps(defs[f"{len(defs) - 1:x}"])) + 10
    return {"json_schema": {"$ref": "#/$defs/0", "$defs": defs | {f"{len(defs):x}": end}}}


def nested(depth, wrap, schema):
    for _ in range(depth):
        schema = wrap(schema)
    return {"json_schema": schema}


def rules(line, count, end):
    return {"lark": "start: " + line(0).split(":")[0] + "\n" + "\n".join(map(line, range(count))) + "\n" + end}


def properties(count, **more):
    return {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}} | more}


STRING = {"type": "string"}
HOSTILE = {
    "references": chain(lambda ref: ref, STRING),
    "references in arrays": chain(lambda ref: {"items": ref}, STRING),
    "references in allOf": chain(lambda ref: {"allOf": [ref, {"maxLength": 3}]}, STRING),
    "references twice": chain(lambda ref: {"anyOf": [ref, {"type": "array", "items": ref}]}, STRING),
    "a reference to itself": {"json_schema": {"$ref": "#"}},
    "recursion without an end": {
        "json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    },
    "nested objects": nested(300, lambda s: {"type": "object", "properties": {"a": s}, "required": ["a"]}, STRING),
    "nested arrays": nested(60, lambda s: {"type": "array", "items": s}, STRING),
    "beyond Python's recursion": nested(20_000, lambda s: {"items": s}, STRING),
    "exponential allOf": {
        "json_schema": {
            "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": STRING}} for j in range(3)]} for i in range(12)]
        }
    },
    "optional properties": properties(3000),
    "required properties": properties(3000, required=[f"p{i}" for i in range(3000)]),
    "a long enum": {"json_schema": {"enum": [f"value number {i}" for i in range(5000)]}},
    "long strings": {"json_schema": {"type": "string", "minLength": 10**9}},
    "many items": {"json_schema": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}},
    "a prime": {"json_schema": {"type": "integer", "multipleOf": 999_999_937}},
    "huge numbers": {"json_schema": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
    "patterns": {
        "json_schema": {"properties": {f"p{i}": {"type": "string", "pattern": f"^.*a.{{{i}}}b$"} for i in range(200)}}
    },
    "backtracking": {"regex": "(a+)+b"},
    "more backtracking": {"regex": "(a|aa)*(a|b)*.{500}"},
    "repeated repetition": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "exponential automaton": {"regex": "|".join(f"(.|\n)*{c}(.|\n){{{30 + i}}}" for i, c in enumerate("abcdefgh"))},
    "many letters": {"regex": r"(\w|\p{L}){0,5000}\W"},
    "parentheses": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    "rules": rules(lambda i: f"a{i}: a{i + 1}", 4000, 'a4000: "x"'),
    "terminals": rules(lambda i: f'A{i}: "y" A{i + 1} | "z"', 2500, 'A2500: "x"'),
    "ambiguous rules": {"lark": 'start: s\ns: s s | s s s | "a" | "b" |'},
    "single characters": {"lark": "start: c*\nc: /(.|\\n)/"},
    "negations": {"lark": "start: X\nX: /(?s:.*)/ & ~/(?s:.*)AAA(?s:.*)/ & ~/(?s:.*)a(?s:.){20}(?s:.*)/"},
    "no grammar": {"lark": "\x00\xff(((<[[{{{%%%"},
    "the form of llguidance": {"lark": '{"grammars": [{"json_schema": {"$ref": "file:///etc/passwd"}}]}'},
    "a file": {"lark": 'start: %json {"$ref": "file:///etc/passwd"}'},
    "choices": {"choice": ["a" * i for i in range(1, 400)]},
}


def refusal(work):
    """What `work` is refused with, and its CPU time."""
    began, said = time.process_time(), None
    try:
        work()
    except InvalidArgumentError as error:
        said = str(error)
    return said, time.process_time() - began


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_or_bounded(compiler, name):
    grammar, answers, draw = Grammar(**HOSTILE[name]), [], random.Random(0)
    said, took = refusal(lambda: answers.extend(compiler.begin(grammar, 1)))
    assert took < 5
    if said is not None:
        assert re.match("grammar[.:]", said)
        assert len(said) < 700
        return
    (answer,) = answers

    def step():
        bits = np.unpackbits(allowed_tokens({0: answer}, 1, 2048)[0], bitorder="little")
        answer.accept(int(draw.choice(np.flatnonzero(bits))))

    for _ in range(30):
        said, took = refusal(step)
        assert took < 0.5
        if said is not None:
            assert re.match("grammar: .*; simplify it", said)
        if said is not None or answer.complete:
            return


def test_what_is_too_large_is_not_compiled(compiler, monkeypatch):
    monkeypatch.setattr(compiling, "LLMatcher", None)
    with pytest.raises(InvalidArgumentError, match=r"grammar.json_schema has .* bytes; it takes at most 131,072"):
        compiler.begin(Grammar(**properties(8000)), 1)


def test_a_compiler_that_hangs_is_waited_for_no_longer_than_said_and_takes_its_slot_alone(compiler, monkeypatch):
    monkeypatch.setattr(compiling, "_LONGEST_S", 0.2)
    compile_it = compiling.LLMatcher

    def hanging(tokenizer, source, **more):
        if "hang" in source:
            time.sleep(2)
        return compile_it(tokenizer, source, **more)

    monkeypatch.setattr(compiling, "LLMatcher", hanging)
    for text in ("hang 1", "hang 2"):
        with pytest.raises(InvalidArgumentError, match=r"grammar.choice takes more than 0.2 s to compile"):
            compiler.begin(Grammar(choice=[text]), 1)
    with pytest.raises(OverloadedError, match="other grammars are being compiled"):
        compiler.begin(Grammar(choice=["late"]), 1)
    time.sleep(2)
    assert compiler.begin(Grammar(choice=["late"]), 1)
