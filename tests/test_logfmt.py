"""Log lines: one line, and fields that nobody can make up."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from wicore_backend.observability.logfmt import logfmt


def test_fields_come_in_order_and_none_is_left_out():
    assert logfmt("request", id="a#1", n=3, s=0.12345, gone=None) == "request id=a#1 n=3 s=0.123"


@given(st.text())
def test_any_text_stays_one_field_of_one_line_and_can_be_read_back(text):
    line = logfmt("request", id=text, n=1)
    assert line.isascii()
    assert line.isprintable()
    match = re.fullmatch(r'request id=("(?:[^"\\]|\\.)*"|\S+) n=1', line)
    assert match
    value = match[1]
    assert (json.loads(value) if value.startswith('"') else value) == text
