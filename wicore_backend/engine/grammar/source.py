"""From a Grammar to the text that llguidance compiles.

JSON is written with at most one space, or a line break and its indentation, where JSON allows any: a model cannot fill
its answer with white space. Strings have no \\uXXXX escapes, so that each has one spelling: with them, what the schema
says of a property `a` would not hold for one that is written `\\u0061`.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from wicore_backend.engine.grammar.json_schema import exact_json_schema
from wicore_backend.engine.grammar.spec import Grammar, JsonSchema, Tags
from wicore_backend.errors import InvalidArgumentError

_LARGEST = 128 * 1024
"""Bytes of a grammar: one of this size takes under a second to compile and llguidance's recursion no more stack than
`compiler.py` gives it, whatever it says (tests/test_structured_hostile.py)."""

_JSON_OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"\x20|\x0A\x20{0,40}",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}
"""All of them, so that none in a schema of a client's holds."""


def source_of(grammar: Grammar) -> str:
    """The grammar in llguidance's own form; the same text for what means the same, as far as it shows.

    Raises
    ------
    InvalidArgumentError
        If it is too large, nested too deeply, or has a keyword that could not be kept.
    """
    source: str
    match grammar:
        case Grammar(json_object=True):
            source = _json_source({"type": "object"})
        case Grammar(json_schema=dict() | bool() as schema):
            source = _json_source(schema)
        case Grammar(regex=str() as regex):
            source = LLMatcher.grammar_from_regex(regex)
        case Grammar(choice=tuple() as texts):
            source = LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(map(_text, texts))}\n")
        case Grammar(tags=Tags() as tags):
            source = LLMatcher.grammar_from_lark(_tags_source(tags))
        case _:
            assert grammar.lark is not None
            source = LLMatcher.grammar_from_lark(grammar.lark)
    if len(source) > _LARGEST:
        raise InvalidArgumentError(f"grammar.{grammar.form} has {len(source):,} bytes; it takes at most {_LARGEST:,}")
    return source


def _json_source(schema: JsonSchema) -> str:
    source: str = LLMatcher.grammar_from_json_schema(_dumped(schema))
    return source


def _dumped(schema: JsonSchema) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return json.dumps(exact_json_schema(schema) | {"x-guidance": _JSON_OPTIONS}, ensure_ascii=False)


def _tags_source(tags: Tags) -> str:
    """Once a line has begun with the trigger, the lexer's lazy `head` leaves no way back to the text."""
    trigger, rests = _text(tags.trigger), " | ".join(f"rest_{i}" for i in range(len(tags.tags)))
    start = "TEXT | first" if tags.text else "tag" if tags.otherwise is None else "otherwise | tag"
    more = " (SEPARATOR tag)*" if tags.many else ""
    tail = " TAIL?" if tags.tails else ""
    rules = [f"start: {start}{more}{tail}", f"tag: {trigger} ({rests})"]
    if tags.text:
        rules += [
            r"TEXT: /(.|\n)*/",
            r"LINES: /((.|\n)*\n)?/",
            f"head[lazy]: LINES {trigger}",
            f"first: head ({rests})",
        ]
    if tags.otherwise is not None:
        rules.append(f"otherwise: %json {_dumped(tags.otherwise)}")
    if tags.many:
        rules.append(f"SEPARATOR: {_text(tags.separator)}")
    if tags.tails:
        rules.append(f"TAIL: {' | '.join(map(_text, tags.tails))}")
    for i, tag in enumerate(tags.tags):
        begin = tag.begin.removeprefix(tags.trigger)
        rules += [f"rest_{i}: {_text(begin)} body_{i} {_text(tag.end)}", f"body_{i}: %json {_dumped(tag.json_schema)}"]
    return "\n".join(rules) + "\n"


def _text(text: str) -> str:
    """A text as a literal of the grammar, nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""
