"""`segments.json` may come from elsewhere: what is wrong with it is said, and no file is opened that should not be."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gemma3_random import write_random_checkpoint
from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.manifest import SegmentSet


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A complete export."""
    path = tmp_path_factory.mktemp("manifest")
    write_random_checkpoint(path / "model", text={"num_hidden_layers": 2})
    export_segments(path / "model", path / "out", Precision.FP32)
    return path / "out"


@pytest.fixture
def directory(pristine, tmp_path):
    for path in pristine.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "segments.json").unlink()  # So that what a test writes is not in the others' file.
    (tmp_path / "segments.json").write_bytes((pristine / "segments.json").read_bytes())
    return tmp_path


def _change(directory, change):
    path = directory / "segments.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _refused(directory, message):
    with pytest.raises(SegmentError, match=message) as caught:
        SegmentSet.read(directory)
    assert str(directory) in str(caught.value)
    assert "export the segments again" in str(caught.value)


def test_what_was_written_is_read(directory):
    before = SegmentSet.read(directory)
    before.write()
    assert SegmentSet.read(directory) == before


def test_a_missing_file_is_told_from_a_broken_one(directory):
    (directory / "segments.json").unlink()
    _refused(directory, r"has no segments\.json: it holds no complete export")
    (directory / "segments.json").mkdir()
    _refused(directory, "cannot be read: .*Is a directory")


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_file(directory, length):
    content = (directory / "segments.json").read_bytes()
    (directory / "segments.json").write_bytes(content[:length])
    _refused(directory, "cannot be read")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"version": ' + b"9" * 5000 + b"}"])
def test_what_no_parser_takes(directory, content):
    (directory / "segments.json").write_bytes(content)
    _refused(directory, "cannot be read")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_json_of_another_kind(directory, content):
    (directory / "segments.json").write_text(content)
    _refused(directory, "holds a .* at its top")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, "has version 3 in place of 2"),
        ("version", "1", "version is '1' in place of a whole number"),
        ("searched", 1, "searched is 1 in place of true or false"),
        ("version", True, "version is True in place of a whole number"),
        ("precision", "int3", "precision is 'int3' in place of fp32 or bf16"),
        ("precision", ["fp32"], r"precision is \['fp32'\] in place of"),
        ("weights", "outside", "weights is 'outside' in place of embedded or inputs"),
        ("fingerprint", None, "fingerprint is None in place of a text"),
        ("segments", {}, "segments is {} in place of a list"),
        ("segments", [3], r"holds a int at segments\[0\]\."),
    ],
)
def test_a_wrong_value_is_named(directory, key, value, message):
    _change(directory, lambda content: content.update({key: value}))
    _refused(directory, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "middle", r"segments\[1\]\.kind is 'middle' in place of first or mid"),
        ("layer", -1, r"segments\[1\]\.layer is -1"),
        ("file", "../first.onnx", r"file is '\.\./first\.onnx' in place of the name of an \.onnx file beside it"),
        ("file", "/etc/passwd", "in place of the name of an"),
        ("file", "..", "in place of the name of an"),
        ("file", "segments.json", "in place of the name of an"),
        ("file", "a\x00.onnx", "lacks a\x00.onnx"),
        ("file", "mid_007.onnx", r"lacks mid_007\.onnx, which its manifest names"),
        ("bytes", 12, r"have [\d,]+ bytes in place of 12"),
        ("inputs", [{"name": "hidden", "type": "complex64", "shape": []}], r"type is 'complex64' in place of float32"),
        ("inputs", [{"name": "hidden", "type": "float32", "shape": [0]}], "shape is .* in place of a list of sizes"),
        ("outputs", [{"name": "", "type": "float32", "shape": []}], "name is '' in place of a text"),
        ("weights", None, "weights is None in place of a list"),
    ],
)
def test_a_wrong_segment_is_named(directory, key, value, message):
    _change(directory, lambda content: content["segments"][1].update({key: value}))
    _refused(directory, message)


def test_a_segment_twice(directory):
    _change(directory, lambda content: content["segments"].append(content["segments"][0]))
    _refused(directory, "names a segment twice")


@pytest.mark.parametrize("name", ["first.onnx", "first.bin"])
def test_a_link_out_of_the_directory_is_not_followed(directory, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)
    _refused(directory, "file is 'first.onnx' in place of a file beside it, and no link to one elsewhere")


def test_a_file_that_was_cut_short(directory):
    whole = (directory / "mid_000.bin").read_bytes()
    (directory / "mid_000.bin").unlink()
    _refused(directory, r"mid_000\.onnx and its data have")
    (directory / "mid_000.bin").write_bytes(whole[:-1])
    _refused(directory, r"mid_000\.onnx and its data have")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON, data=st.data())
def test_any_value_in_any_place_is_read_or_refused(pristine, tmp_path_factory, value, data):
    content = json.loads((pristine / "segments.json").read_text())
    place = content
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parent, place = place, place[key]
        if data.draw(st.booleans()):
            break
    parent[key] = value
    directory = tmp_path_factory.mktemp("any")
    for path in pristine.iterdir():
        os.link(path, directory / path.name)
    (directory / "segments.json").unlink()
    (directory / "segments.json").write_text(json.dumps(content))
    try:
        read = SegmentSet.read(directory)
    except SegmentError:
        return
    assert all(isinstance(file.nbytes, int) and not math.isnan(file.nbytes) for file in read.files.values())
