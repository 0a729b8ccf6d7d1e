"""Tools and schemas through gateway and server, with the clients that people use."""

import json
from typing import Literal

import jsonschema
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from scripts.serving.gateway import Gateway, GatewayOptions

MODEL = "wicore"
USER = {"role": "user", "content": "How is the weather?"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Berlin", "北京"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME, "strict": False}},
]
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}


@pytest.fixture(scope="module")
def base_url(server, installation, tmp_path_factory):
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    with Gateway(GatewayOptions(port=0), installation, server.urls, log=log) as gateway:
        yield f"http://127.0.0.1:{gateway.port}/v1"


@pytest.fixture(scope="module")
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def checked(call):
    """A call's arguments, valid by its tool's schema."""
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, SCHEMAS[call.function.name])
    return arguments


def test_a_required_tool_is_called(client):
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=[USER], tools=TOOLS, tool_choice="required", temperature=1.0, seed=seed,
            parallel_tool_calls=False, max_tokens=200,
        )  # fmt: skip
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        checked(call)


def test_a_named_tool_is_the_one_that_is_called(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[USER], tools=TOOLS, max_tokens=200, temperature=1.0, seed=1, parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "get_time"}},
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_time"
    assert checked(call)["zone"] in ("UTC", "CET")


def test_streamed_calls_add_up_to_whole_ones(client):
    asked = {"model": MODEL, "messages": [USER], "tools": TOOLS, "tool_choice": "required", "temperature": 1.0}
    asked |= {"seed": 7, "max_tokens": 300, "n": 2}
    whole = client.chat.completions.create(**asked)
    calls: dict = {}
    reasons = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            for part in choice.delta.tool_calls or ():
                if part.id is not None:
                    assert part.function.arguments == ""
                    assert part.index == sum(index == choice.index for index, _ in calls)
                    calls[choice.index, part.index] = [part.function.name, ""]
                else:
                    calls[choice.index, part.index][1] += part.function.arguments
    for choice in whole.choices:
        expected = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]
        assert [call for (index, _), call in sorted(calls.items()) if index == choice.index] == expected
        assert reasons[choice.index] == choice.finish_reason


def test_auto_answers_in_text_or_calls(client):
    for seed in range(4):
        answer = client.chat.completions.create(
            model=MODEL, messages=[USER], tools=TOOLS, temperature=1.0, seed=seed, max_tokens=60
        )
        (choice,) = answer.choices
        calls = choice.message.tool_calls or []
        assert choice.message.content or calls
        assert (choice.finish_reason == "tool_calls") == bool(calls) or choice.finish_reason == "length"


def test_none_calls_nothing_and_results_of_calls_are_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    for choice in ("none", "auto"):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=20
        )
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    with pytest.raises(openai.BadRequestError, match="call_2"):
        client.chat.completions.create(model=MODEL, messages=[*messages[:2], messages[2] | {"tool_call_id": "call_2"}])


class Sum(BaseModel):
    """An answer."""

    total: int = Field(ge=0, le=99)
    kind: Literal["even", "odd"]
    sure: bool


def test_json_schema_gives_valid_json(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "one", "strict": True, "schema": schema}}
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=MODEL, messages=[USER], response_format=form, temperature=1.0, seed=2, stream=stream
        )
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        jsonschema.validate(json.loads(text), schema)


def test_the_clients_own_models_are_parsed(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=[USER], response_format=Sum, temperature=1.0, seed=4, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)


def test_json_object_gives_an_object(client):
    answer = client.chat.completions.create(model=MODEL, messages=[USER], response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_schema_and_tools_go_together(client):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=[USER], response_format=form, tools=TOOLS, temperature=1.0, seed=seed,
            parallel_tool_calls=False, max_tokens=200,
        )  # fmt: skip
        message = answer.choices[0].message
        if message.tool_calls:
            checked(message.tool_calls[0])
        else:
            jsonschema.validate(json.loads(message.content), schema)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS + TOOLS}, "tools[2]"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, None),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, asked, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[USER], **asked)
    assert param is None or (refused.value.param or "").startswith(param)
    assert param is not None or '"not"' in str(refused.value)


def test_a_bias_of_100_repeats_its_token(client):
    answer = client.chat.completions.create(model=MODEL, messages=[USER], logit_bias={"1554": 100}, max_tokens=5)
    assert answer.choices[0].message.content == "aaaaa"


def get_weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{city}, {days} days"


def test_langchain_binds_tools_and_reads_structured_output(base_url):
    model = ChatOpenAI(base_url=base_url, api_key="none", model=MODEL, temperature=1.0, seed=5, max_tokens=300)
    bound = model.bind_tools(TOOLS, tool_choice="get_weather", parallel_tool_calls=False)
    answer = bound.invoke([HumanMessage("How is the weather?")])
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    jsonschema.validate(call["args"], WEATHER)
    result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
    assert model.invoke([HumanMessage("How is the weather?"), answer, result]).content is not None
    streamed = None
    for chunk in bound.stream("How is the weather?"):
        streamed = chunk if streamed is None else streamed + chunk
    jsonschema.validate(streamed.tool_calls[0]["args"], WEATHER)
    for method in ("json_schema", "function_calling"):
        parsed = model.with_structured_output(Sum, method=method).invoke("What is 12 + 7?")
        assert isinstance(parsed, Sum)
