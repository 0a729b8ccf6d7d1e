"""What a request says of its answer's form. The same object is the value of `grammar` on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from wicore_backend.settings import Settings

JsonSchema = dict[str, Any] | bool
Text = Annotated[str, Field(max_length=2**16)]
Literal = Annotated[str, Field(min_length=1, max_length=4096)]

_FORMS = ("json_schema", "json_object", "regex", "choice", "lark", "tags")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Tag(Settings):
    """A piece of JSON between two texts."""

    begin: Literal
    """What it starts with; the trigger, first of all."""

    json_schema: JsonSchema
    """What stands between `begin` and `end`."""

    end: Annotated[str, Field(max_length=4096)] = ""


class Tags(Settings):
    """Free text that may turn into tagged JSON, or tagged JSON at once: calls of tools, for example.

    With `text` the answer is free until a line begins with `trigger`; from there on it is tags. Without, it is tags
    from its first character, unless it is JSON by `otherwise`. After the last tag the answer ends.
    """

    trigger: Literal
    """With what every tag begins, and no line of the text does."""

    tags: Annotated[tuple[Tag, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=256)]

    text: bool = True
    """Text may come first, or alone."""

    otherwise: JsonSchema | None = None
    """By what the answer may be JSON instead of tags; not with `text`."""

    many: bool = True
    """More than one tag may come."""

    separator: Literal = "\n"
    """Between two tags."""

    tails: Annotated[tuple[Literal, ...], BeforeValidator(_tuple), Field(max_length=8)] = ()
    """Texts of which one may follow the last tag: the end of a code fence that the text has opened, say."""

    @model_validator(mode="after")
    def _tags_begin_with_the_trigger(self) -> Self:
        for tag in self.tags:
            if not tag.begin.startswith(self.trigger):
                raise ValueError(f"the tag {tag.begin[:80]!r} does not begin with the trigger {self.trigger[:80]!r}")
        if self.text and self.otherwise is not None:
            raise ValueError("otherwise does not go with text = True, which leaves any answer open")
        if "\n" in self.trigger:
            raise ValueError(f"trigger = {self.trigger[:80]!r} has a line break; it is the beginning of one line")
        return self


class Grammar(Settings):
    """The form of an answer, one of these. Documentation of what each takes: `docs/structured-output.md`."""

    json_schema: JsonSchema | None = None
    """A JSON Schema (draft 2020-12) that the answer, JSON, is valid by."""

    json_object: bool | None = None
    """True: the answer is a JSON object, whichever."""

    regex: Annotated[Text, Field(min_length=1)] | None = None
    """The whole answer matches it: the syntax of Rust's regex crate, without look-around."""

    choice: Annotated[tuple[Literal, ...] | None, BeforeValidator(_tuple), Field(min_length=1, max_length=9999)] = None
    """The answer is one of these texts."""

    lark: Annotated[Text, Field(min_length=1)] | None = None
    """A context-free grammar in llguidance's variant of Lark's syntax, with the rule `start`."""

    tags: Tags | None = None
    """Text and tagged JSON."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"it takes one of {', '.join(_FORMS)}, not {' and '.join(given) or 'none'}")
        if self.json_object is False:
            raise ValueError("json_object = False says nothing; leave the grammar out")
        return self

    @property
    def form(self) -> str:
        """The name of the one that is given."""
        return next(name for name in _FORMS if getattr(self, name) is not None)
