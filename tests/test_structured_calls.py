"""Calls of tools found in streamed text: the same however it is cut, and as by a plain reading of the whole."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wicore_backend.gateway.call_format import call_text
from wicore_backend.gateway.call_parser import CallArguments, CallStart, TextDelta, ToolCallParser

NAMES = ("get", "get_weather", "add-2")
CALL = call_text("get", '{"a": "}\\"{\\n", "b": [1, {"c": []}]}')


def parse(pieces, names=NAMES):
    """Text and calls [name, arguments] of an answer in pieces, and whether the parser says that it calls."""
    ids = iter(range(1000))
    parser = ToolCallParser(names, new_id=lambda: f"call_{next(ids)}")
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    text, calls = "", []
    for part in parts:
        match part:
            case TextDelta(more):
                assert more
                assert not calls, "text after a call"
                text += more
            case CallStart(index, call_id, name):
                assert (index, call_id) == (len(calls), f"call_{index}")
                calls.append([name, ""])
            case CallArguments(index, more):
                assert more
                assert index == len(calls) - 1
                calls[index][1] += more
    return text, calls, parser.called


def read_whole(text, names=NAMES):
    """The same by other means: regular expressions and a JSON decoder over the whole text."""
    opening = re.compile(r'\{"name": "(' + "|".join(map(re.escape, names)) + r')", "parameters": ')
    first = re.search(r"^" + opening.pattern, text, re.MULTILINE)
    if first is None:
        return text, [], False
    before = text[: first.start()].split("\n")[:-1]
    fences = 0
    while before and re.fullmatch(r"[ \t]*(```\w*)?[ \t]*", before[-1]):
        fences += "`" in before[-1]
        if fences > 1:
            break
        before.pop()
    calls, at = [], first.start()
    while match := opening.match(text, at):
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end())
        except ValueError:
            return "\n".join(before), [*calls, [match[1], text[match.end() :]]], False
        calls.append([match[1], text[match.end() : end]])
        line = text.find("\n", end)
        at = len(text) if line < 0 else line + 1
    return "\n".join(before), calls, True


pieces_of_answers = st.lists(
    st.sampled_from(
        [
            *("Let me see.", "\n", "\n\n", " ", "```", "```json", "`", "{", "日本語 é", '"', "}", "x"),
            *('{"name": ', '"get"', '{"name": "nobody", ', CALL, CALL, CALL[:9], CALL[:30]),
            *(call_text("get_weather", "{}"), call_text("add-2", '{"x": 1.5}')),
        ]
    ),
    max_size=7,
).map("".join)


@st.composite
def answers_in_pieces(draw):
    text = draw(pieces_of_answers)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(answers_in_pieces())
@example(("a\n```json\n" + CALL + "\n```", ["a\n", "``", "`json", "\n", CALL[:4], CALL[4:] + "\n```"]))
def test_any_cut_gives_what_the_whole_gives(answer):
    text, pieces = answer
    whole = parse([text])
    assert parse(pieces) == whole
    assert parse(list(text)) == whole


balanced = st.lists(
    st.sampled_from(
        ["Let me see.", "\n", " ", "```", "```json\n", "`", '{"name": "x"}', "\n" + CALL, "\n" + CALL + "\n"]
    ),
    max_size=7,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(balanced)
@example(CALL)
@example("text " + CALL)
@example("```\n```json\n\n" + CALL)
@example("Sure.\n" + CALL[:40])
def test_the_parser_agrees_with_a_plain_reading(text):
    found = read_whole(text)
    said, calls, called = parse(text)
    assert (said, calls, called) == found


def test_text_comes_as_it_is_written():
    parser = ToolCallParser(NAMES)
    assert parser.feed("Hello") == [TextDelta("Hello")]
    assert parser.feed(" world {") == [TextDelta(" world {")]
    assert parser.feed("\n") == []
    assert parser.feed("and") == [TextDelta("\nand")]
    assert parser.finish() == []
    assert not parser.called


def test_a_call_is_told_as_soon_as_its_name_is_there_and_its_arguments_as_they_come():
    parser = ToolCallParser(NAMES, new_id=lambda: "call_1")
    assert parser.feed('{"name": "get", "parameters": ') == [CallStart(0, "call_1", "get")]
    assert parser.feed('{"city": "Ber') == [CallArguments(0, '{"city": "Ber')]
    assert parser.feed('lin"}') == [CallArguments(0, 'lin"}')]
    assert parser.called
    assert parser.feed("}\n") == parser.finish() == []


def test_a_call_that_is_cut_is_no_whole_answer():
    text, calls, called = parse(["Sure.\n" + CALL + "\n" + CALL[:-12]])
    assert (text, len(calls), called) == ("Sure.", 2, False)


@pytest.mark.parametrize(
    "text", ['{"name": "nobody", "parameters": {}}', 'say {"name": "get", "parameters": {}}', "`", "\n"]
)
def test_what_is_no_call_stays_text(text):
    assert parse(list(text)) == (text, [], False)


def test_ids_differ():
    parser = ToolCallParser(NAMES)
    ids = [part.id for part in parser.feed(f"{CALL}\n{CALL}\n{CALL}") if isinstance(part, CallStart)]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call_id) for call_id in ids)
