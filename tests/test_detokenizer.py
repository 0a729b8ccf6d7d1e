"""Streaming text: never half a character, never a part of a stop string."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wicore_backend.engine.detokenizer import Detokenizer


def feed(data: bytes, cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    """Text pieces of `data` cut into tokens at `cuts`."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    tokens = [data[a:b] for a, b in pairwise(edges)]
    detokenizer = Detokenizer(lambda index: tokens[index], stop)
    pieces = []
    for index in range(len(tokens)):
        pieces.append(detokenizer.push(index))
        if detokenizer.stopped_by is not None:
            break
    return [*pieces, detokenizer.finish()], detokenizer


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_cut_of_any_text_gives_the_text(text, cuts):
    pieces, _ = feed(text.encode(), cuts)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(
    st.text(alphabet="abc红", max_size=40),
    st.lists(st.integers(0, 200)),
    st.lists(st.text("abc红", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(text, cuts, stops):
    pieces, detokenizer = feed(text.encode(), cuts, tuple(stops))
    shown = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        # A longer stop string may begin earlier yet end later than the one that is complete first.
        assert detokenizer.stopped_by is not None
        assert text.startswith(shown + detokenizer.stopped_by)
        assert not any(stop in shown for stop in stops)
    else:
        assert detokenizer.stopped_by is None
        assert shown == text
    for index in range(len(pieces) - 1):
        so_far = "".join(pieces[: index + 1])
        assert shown.startswith(so_far)


def test_a_stop_string_across_tokens_is_held_back_until_it_is_refuted():
    detokenizer = Detokenizer(lambda t: [b"one ST", b"O", b"RM ST", b"OP two"][t], ("STOP",))
    assert [detokenizer.push(t) for t in range(4)] == ["one ", "", "STORM ", ""]
    assert detokenizer.stopped_by == "STOP"
    assert detokenizer.finish() == ""


def test_of_two_stop_strings_the_earlier_wins_and_then_the_longer():
    detokenizer = Detokenizer(lambda _: b"xabc", ("bc", "ab", "abc"))
    assert detokenizer.push(0) == "x"
    assert detokenizer.stopped_by == "abc"


@pytest.mark.parametrize("data", [b"\xe7\xba", b"ok \xff", b"\xe7\xbaA"])
def test_bytes_that_are_no_text_become_replacement_characters_at_the_end(data):
    pieces, _ = feed(data, list(range(len(data))))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_is_shown_once_whole():
    detokenizer = Detokenizer(lambda t: "红".encode()[t : t + 1])
    assert [detokenizer.push(t) for t in range(3)] == ["", "", "红"]
