"""The checkpoint's chat template, rendered in a sandbox as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.processor.checkpoint_files import read_json_if_present

RENDER_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""A template is a program: messages that it did not expect end in any of these."""


class ChatTemplate:
    """A Jinja template that turns messages into the text the model was trained on.

    Parameters
    ----------
    source
        The template.
    variables
        The names it may use beside the messages: `bos_token` and the other named tokens.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from None

    @classmethod
    def from_checkpoint(cls, directory: Path, *, variables: Mapping[str, str]) -> Self | None:
        """The checkpoint's template, None if it has none.

        Looked for in chat_template.jinja, chat_template.json, and `chat_template` of tokenizer_config.json, in the
        order that transformers' processor has.
        """
        source = _template_source(directory)
        return None if source is None else cls(source, variables=variables)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, ending where the model's answer begins.

        Raises
        ------
        InvalidArgumentError
            The template refuses the messages, for instance because roles do not alternate.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._variables
            )
        except RENDER_FAULTS as error:
            raise InvalidArgumentError(f"the model's chat template refuses the messages: {error}") from None


def _template_source(directory: Path) -> str | None:
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.exists():
        try:
            return jinja_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{jinja_file} cannot be read: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = read_json_if_present(directory / name).get("chat_template")
        if isinstance(source, list):
            source = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
        if isinstance(source, dict):
            source = source.get("default")
        if isinstance(source, str):
            return source
        if source is not None:
            raise CheckpointError(f"{directory / name}: chat_template is a {type(source).__name__}, not a text")
    return None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the model's words for training; they render as they stand."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, with the settings and helpers that transformers documents for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As JSON without the HTML escapes that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
