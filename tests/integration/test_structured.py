"""Structured output through the real server: a schema, calls of tools, several answers, and grammars that mean harm."""

import json
import threading
import time

import jsonschema
import pytest
from wicore_client import InvalidArgument

from tests.integration.wire import client, generate, wait_idle
from wicore_backend.gateway import tools

QUESTION = "What is 12 + 7?"
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["sum", "note"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Berlin", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}


def test_answers_are_valid_by_the_schema(server):
    with client(server) as c:
        whole = c.generate(QUESTION, grammar={"json_schema": SCHEMA}, temperature=1.0, seed=3, n=3, max_tokens=200)
        streamed = c.stream(QUESTION, grammar={"json_schema": SCHEMA}, temperature=1.0, seed=3, n=3, max_tokens=200)
        assert streamed.completion().answers == whole.answers
    assert len(whole.answers) == 3
    for answer in whole.answers:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_a_grammar_goes_as_a_plain_field_of_generate_too(server):
    status, text = generate(server, text_input=QUESTION, grammar='{"regex": "[0-9]{2}"}', logit_bias='{"60": -100}')
    assert status == 200, text
    assert json.loads(text)["text_output"].isdecimal()
    status, text = generate(server, text_input=QUESTION, grammar='{"regex": "("}')
    assert status == 400
    assert "[invalid_argument]" in text
    assert "unclosed group" in text


def test_a_tool_is_called_with_arguments_by_its_schema(server):
    plan = tools.plan([WEATHER], "required", True)
    messages = tools.render_messages([{"role": "user", "content": "How is the weather?"}], plan)
    parser = plan.parser()
    parts: list = []
    with client(server) as c:
        for chunk in c.stream(messages, temperature=1.0, seed=1, max_tokens=300, **plan.options):
            parts += parser.feed(chunk.text)
    parts += parser.finish()
    assert parser.called
    assert isinstance(parts[0], tools.CallStart)
    assert parts[0].name == "get_weather"
    arguments = "".join(part.text for part in parts[1:] if isinstance(part, tools.CallArguments) and part.index == 0)
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def chain(links: int) -> dict:
    """References of references: a compiler that follows them by recursion runs out of stack."""
    defs = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(links)} | {str(links): {"type": "string"}}
    return {"$ref": "#/$defs/0", "$defs": defs}


HOSTILE = {
    "a chain of references": {"json_schema": chain(3500)},
    "too large": {"json_schema": chain(9000)},
    "a rule chain": {"lark": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4000)) + '\na4000: "x"'},
    "wide": {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
    "deep": {"regex": "(" * 20000 + "a" + ")" * 20000},
    "ambiguous": {"lark": 'start: s\ns: s s | s s s | "a" | "b" |'},
    "states": {"regex": "|".join(f"(.|\n)*{c}(.|\n){{{30 + i}}}" for i, c in enumerate("abcdefgh"))},
}


def test_grammars_that_mean_harm_hold_up_nobody(server):
    """Each ends by itself, answered or refused, and others are answered meanwhile."""
    ended = {}

    def attack(name):
        with client(server) as c:
            try:
                c.generate("x", grammar=HOSTILE[name], max_tokens=40, temperature=1.0, timeout=60)
                ended[name] = "answered"
            except InvalidArgument as error:
                ended[name] = str(error)

    threads = [threading.Thread(target=attack, args=(name,)) for name in HOSTILE]
    for thread in threads:
        thread.start()
    waits = []
    with client(server) as c:
        while any(thread.is_alive() for thread in threads) or len(waits) < 5:
            began = time.monotonic()
            c.generate(QUESTION, max_tokens=4, timeout=30)
            waits.append(time.monotonic() - began)
    assert ended.keys() == HOSTILE.keys()
    assert ended["a chain of references"] == ended["a rule chain"] == "answered"
    assert "it takes at most" in ended["too large"]
    assert max(waits) < 10
    wait_idle(server, 5)


@pytest.mark.parametrize("grammar", [{"json_schema": {"not": {}}}, {"nothing": 1}, {"json_object": True, "regex": "a"}])
def test_what_cannot_be_kept_is_refused_before_the_first_token(server, grammar):
    with client(server) as c, pytest.raises(InvalidArgument, match="grammar"):
        c.generate(QUESTION, grammar=grammar)
