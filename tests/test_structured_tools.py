"""OpenAI's tools and response formats: what the engine is asked, what the model is told, and what is refused."""

import json
from pathlib import Path

import pytest

from wicore_backend.engine.grammar.source import source_of
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.gateway import structured, tools
from wicore_backend.gateway.call_format import call_text
from wicore_backend.gateway.errors import ApiError, InvalidRequestError, UnsupportedError
from wicore_backend.processor.chat_template import ChatTemplate
from wicore_backend.processor.messages import parse_messages

MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
USER = {"role": "user", "content": "How is the weather?"}


def tool(name="get", **function):
    return {"type": "function", "function": {"name": name, **function}}


def call(name="get", arguments='{"a": 1}', call_id="call_1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def nested(depth):
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def tags(plan):
    """The plan's form; the engine takes it."""
    params = SamplingParams(**plan.options)
    assert source_of(params.grammar)
    return plan.options["grammar"]["tags"]


def names(plan):
    return [function.name for function in plan.functions]


# Which tools may be called.


@pytest.mark.parametrize(
    ("choice", "allowed", "required"),
    [
        (None, ["get", "put"], False),
        ("auto", ["get", "put"], False),
        ("required", ["get", "put"], True),
        ({"type": "function", "function": {"name": "put"}}, ["put"], True),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("put"), tool("put")]}},
            ["put"],
            False,
        ),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("get")]}}, ["get"], True),
    ],
)
def test_a_choice_says_which_and_whether(choice, allowed, required):
    plan = tools.plan([tool(), tool("put")], choice, True)
    assert (names(plan), plan.required) == (allowed, required)
    form = tags(plan)
    assert form["text"] is not required
    assert [tag["begin"] for tag in form["tags"]] == [f'{{"name": "{name}", "parameters": ' for name in allowed]
    assert ("MUST invoke" in plan.declaration) is required
    assert all((f'"name": "{name}"' in plan.declaration) == (name in allowed) for name in ("get", "put"))


def test_no_tools_or_none_of_them_plan_nothing():
    assert tools.plan(None, None, True) is None
    assert tools.plan([], "none", True) is None
    assert tools.plan([tool()], "none", True) is None


def test_one_call_or_several():
    assert tags(tools.plan([tool()], None, True))["many"] is True
    single = tools.plan([tool()], None, False)
    assert tags(single)["many"] is False
    assert "at most one function" in single.declaration


def test_arguments_are_those_declared_unless_the_schema_speaks_of_others():
    (form,) = tags(tools.plan([tool()], None, True))["tags"]
    assert form["json_schema"] == {"type": "object", "properties": {}, "additionalProperties": False}
    given = {"type": "object", "properties": {"a": {}}, "required": ["a"]}
    (form,) = tags(tools.plan([tool(parameters=given, strict=True, description="d")], None, True))["tags"]
    assert form["json_schema"] == given | {"additionalProperties": False}
    for open_ended in ({"additionalProperties": {"type": "string"}}, {"allOf": [{"properties": {"a": {}}}]}):
        (form,) = tags(tools.plan([tool(parameters=open_ended)], None, True))["tags"]
        assert form["json_schema"] == {"type": "object"} | open_ended


def test_deep_schemas_are_declared_and_compiled():
    assert tags(tools.plan([tool(parameters={"additionalProperties": nested(40)})], None, True))


def test_a_schema_of_the_answer_goes_with_tools():
    content = structured.content_schema(structured.wire_options({"type": "json_object"}))
    form = tags(tools.plan([tool()], "auto", True, content))
    assert (form["text"], form["otherwise"]) == (False, {"type": "object"})
    assert "otherwise" not in tags(tools.plan([tool()], "required", True, content))


@pytest.mark.parametrize(
    ("given", "choice", "param", "kind"),
    [
        ([{"type": "custom"}], None, "tools[0].type", UnsupportedError),
        (["x"], None, "tools[0].type", UnsupportedError),
        ([{"type": "function"}], None, "tools[0].function", InvalidRequestError),
        ([{"type": "function", "function": {"name": "a"}, "x": 1}], None, "tools[0].x", InvalidRequestError),
        ([tool("a b")], None, "tools[0].function.name", InvalidRequestError),
        ([tool("x" * 65)], None, "tools[0].function.name", InvalidRequestError),
        ([tool(), tool()], None, "tools[1].function.name", InvalidRequestError),
        ([tool(parameters=[])], None, "tools[0].function.parameters", InvalidRequestError),
        ([tool(parameters=nested(101))], None, "tools[0].function.parameters", InvalidRequestError),
        ([tool(parameters={"type": "string"})], None, "tools[0].function.parameters", InvalidRequestError),
        ([tool(description=1)], None, "tools[0].function.description", InvalidRequestError),
        ([tool(examples=[])], None, "tools[0].function.examples", InvalidRequestError),
        ([tool()], "always", "tool_choice", InvalidRequestError),
        ([tool()], {"type": "function"}, "tool_choice.function", InvalidRequestError),
        ([tool()], {"type": "function", "function": {"name": "put"}}, "tool_choice.function.name", InvalidRequestError),
        ([tool()], {"type": "mcp"}, "tool_choice", InvalidRequestError),
        (None, "required", "tool_choice", InvalidRequestError),
        (None, {"type": "function", "function": {"name": "a"}}, "tool_choice", InvalidRequestError),
    ],
)
def test_what_is_no_function_is_refused_by_its_place(given, choice, param, kind):
    with pytest.raises(kind) as refused:
        tools.plan(given, choice, True)
    assert refused.value.param == param
    assert refused.value.status == 400


# What the model is told.


def rendered(messages, plan=None):
    """The prompt as the model's template has it, which takes turns in alternation only."""
    template = ChatTemplate.from_checkpoint(MODEL, variables={"bos_token": ""})
    found = tools.render_messages(messages, plan)
    parse_messages(found)
    return template.render(found)


def test_tools_are_declared_before_the_conversation():
    plan = tools.plan([tool(description="Gets größe.")], None, True)
    alone = rendered([USER], plan)
    assert alone.startswith("<start_of_turn>user\nYou have access to functions.")
    assert '"description": "Gets größe."' in alone
    assert alone.endswith("How is the weather?<end_of_turn>\n<start_of_turn>model\n")
    told = rendered([{"role": "system", "content": "Be brief."}, USER], plan)
    assert told.startswith("<start_of_turn>user\nBe brief.\n\nYou have access to functions.")


def test_calls_and_results_become_turns():
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(), call("put", "{}", "call_2")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": 'a "quote"\n```'},
        {"role": "user", "content": "And now?"},
    ]
    text = rendered(messages)
    first, second = call_text("get", '{"a": 1}'), call_text("put", "{}")
    assert f"<start_of_turn>model\n{first}\n{second}<end_of_turn>" in text
    assert '```tool_output\n{"name": "get", "content": "sunny"}\n```\n```tool_output\n{"name": "put"' in text
    assert text.count("<start_of_turn>user") == 2
    assert text.endswith("\n```\n\nAnd now?<end_of_turn>\n<start_of_turn>model\n")
    assert rendered(messages[:4]).endswith("```<end_of_turn>\n<start_of_turn>model\n")


def test_what_the_model_called_is_rendered_as_it_was_written():
    plan = tools.plan([tool(parameters={"type": "object", "properties": {"a": {"type": "integer"}}})], None, True)
    answer = call_text("get", '{ "a": 1}')
    parser = plan.parser()
    parts = [*parser.feed(answer), *parser.finish()]
    arguments = "".join(part.text for part in parts if isinstance(part, tools.CallArguments))
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call("get", arguments)]}]
    assert tools.render_messages(messages, None)[1] == {"role": "assistant", "content": answer}


def test_words_beside_calls_stay_and_pictures_keep_their_places():
    picture = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": picture},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call()]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a cat"},
        {"role": "user", "content": picture},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": picture[1:]},
    ]
    found = tools.render_messages(messages, None)
    assert [message["role"] for message in found] == ["user", "assistant", "user", "assistant", "user"]
    assert found[0] == messages[0]
    assert found[1]["content"].startswith('Let me see.\n{"name": "get"')
    assert [part["type"] for part in found[2]["content"]] == ["text", "image", "text"]
    assert found[3:] == messages[4:]
    joined = tools.render_messages([*messages[:3], messages[5]], None)
    assert joined[2]["content"] == [{"type": "text", "text": f"{found[2]['content'][0]['text']}\n\nWhat is it?"}]


def test_a_conversation_without_tools_stays_as_it_is():
    messages = [{"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "a"}, USER]
    assert tools.render_messages(messages, None) == messages


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, {"role": "tool", "tool_call_id": "call_1", "content": "x"}], "messages[1].tool_call_id"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        (
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call()]},
                {"role": "tool", "tool_call_id": "call_2", "content": "x"},
            ],
            "messages[2].tool_call_id",
        ),
    ],
)
def test_results_of_no_call_are_refused(messages, param):
    with pytest.raises(InvalidRequestError) as refused:
        tools.render_messages(messages, None)
    assert refused.value.param == param


# Response formats.


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (None, {}),
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"grammar": {"json_object": True}}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}},
            {"grammar": {"json_schema": {"type": "integer"}}},
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": None, "description": "d"}},
            {"grammar": {"json_schema": {}}},
        ),
    ],
)
def test_a_response_format_is_a_grammar(form, options):
    assert structured.wire_options(form) == options
    json.dumps(SamplingParams(**options).model_dump())


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": ["text"]}, "response_format.type"),
        ({"type": "text", "x": 1}, "response_format.x"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": True}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(5000)}},
            "response_format.json_schema.schema",
        ),
        ({"type": "json_schema", "json_schema": {"name": "x", "scheme": {}}}, "response_format.json_schema.scheme"),
    ],
)
def test_other_formats_are_refused_by_name(form, param):
    with pytest.raises(ApiError) as refused:
        structured.wire_options(form)
    assert (refused.value.param, refused.value.status) == (param, 400)


def test_what_one_side_says_in_several_messages_is_one_turn():
    picture, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look."},
        {"role": "user", "content": [picture, text]},
        {"role": "user", "content": "Tell me."},
        {"role": "assistant", "content": "A circle."},
        {"role": "assistant", "content": "A red one."},
        {"role": "user", "content": "Thanks."},
        {"role": "user", "content": "Another?"},
    ]
    assert tools.render_messages(messages, None) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look."},
                picture,
                {"type": "text", "text": "What is it?\n\nTell me."},
            ],
        },
        {"role": "assistant", "content": "A circle.\n\nA red one."},
        {"role": "user", "content": "Thanks.\n\nAnother?"},
    ]
