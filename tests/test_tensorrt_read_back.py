"""What the real TensorRT-RTX says of the engines that it built here, held against the contract without a card.

`test_tensorrt_engines.py` builds every kind of segment for every card by `build_engine`, which does the same.
"""

import re
from pathlib import Path

import pytest

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import export_segment
from wicore_backend.executor.segments.source import WeightSource
from wicore_backend.executor.tensorrt import building
from wicore_backend.executor.tensorrt.building import Target, build_engine
from wicore_backend.executor.tensorrt.description import report_of_description
from wicore_backend.executor.tensorrt.inspection import check_contract
from wicore_backend.executor.tensorrt.library import Library, load_library, messages_of
from wicore_backend.executor.tensorrt.profiles import profiles_for

DEMO = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
MIDDLE = Segment(SegmentKind.MID, 3)
PROFILES = profiles_for(max_running=16, max_batch_tokens=2048)
OTHERS = profiles_for(max_running=17, max_batch_tokens=2048)


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """The graph of a layer of the demo model's, its matrices in 4 bits."""
    with WeightSource.open(DEMO) as source:
        return export_segment(source, MIDDLE, Precision.INT4, tmp_path_factory.mktemp("graph"), search=False)


@pytest.fixture
def heard(monkeypatch):
    """The libraries' messages in this test, as they are made."""
    made = []

    def messages(self):
        made.append(messages_of(self.api))
        return made[-1]

    monkeypatch.setattr(Library, "messages", messages)
    return made


@pytest.fixture
def build(library, middle, tmp_path):
    def built():
        target = Target(library.name, "sm89", Precision.INT4)
        return build_engine(middle, tmp_path / "mid_003.engine", target=target, profiles=PROFILES, library=library)

    return built


@pytest.fixture(scope="module")
def description(library, middle, tmp_path_factory):
    """What the library says of that layer's engine."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "report_of_description", lambda text, **_: said.append(text))
        build_engine(
            middle,
            tmp_path_factory.mktemp("engines") / "mid_003.engine",
            target=Target(library.name, "sm89", Precision.INT4),
            profiles=PROFILES,
            library=library,
        )
    return said[0]


def read(text):
    return report_of_description(text, weight_bytes=1, activations=(2, 3, 4))


def test_it_is_the_engine_that_is_described(build, middle):
    report = build().report
    assert [tensor.name for tensor in report.inputs] == [tensor.name for tensor in middle.spec.inputs]
    assert report.layers["shape_call"] == len(PROFILES), "one for each profile"
    assert "dequantize" not in report.layers, "a step of the network, which is part of a product in the engine"
    assert report.precisions["INT4"] == 4 * len(PROFILES), "matrices stay in 4 bits"
    assert report.weight_bytes > 400_000
    assert len(report.activation_bytes) == len(PROFILES)


def test_engines_with_other_profiles_than_were_asked_for_are_refused(build, monkeypatch, tmp_path):
    """The network has no profiles: what it was parsed from would show nothing of this."""
    add = building._add_profiles
    monkeypatch.setattr(
        building,
        "_add_profiles",
        lambda config, builder, file, _, messages: add(config, builder, file, OTHERS, messages),
    )
    with pytest.raises(
        ExecutorError, match=r"mid_003: hidden has the ranges \(\(\(1, 256\), \(16, 256\), \(17, 256\)\)"
    ):
        build()
    assert not (tmp_path / "mid_003.engine").exists()


def test_engines_with_other_types_than_were_asked_for_are_refused(build, monkeypatch, library):
    parse = building._parse

    def parse_and_widen(file, network, *rest):
        parser = parse(file, network, *rest)
        values = network.get_output(network.num_outputs - 1)
        network.unmark_output(values)
        wide = network.add_cast(values, library.api.float32).get_output(0)
        values.name, wide.name = "narrow", "v"
        network.mark_output(wide)
        return parser

    monkeypatch.setattr(building, "_parse", parse_and_widen)
    with pytest.raises(ExecutorError, match=r"contract of mid_003: v is float32 in place of bfloat16$"):
        build()


def test_a_library_that_describes_nothing_is_believed_what_it_parsed(build, heard, monkeypatch):
    described = []

    def unreadable(text, **told):
        described.append(text)
        return report_of_description(text.replace("LayerType", "Kind"), **told)

    monkeypatch.setattr(building, "report_of_description", unreadable)
    record = build()
    assert described == [heard[0].description]
    assert record.report.layers["dequantize"] == 4


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [
        (
            "Name: hidden, IOMode: Input, DataType: BFloat16",
            "Name: hidden, IOMode: Input, DataType: Half",
            "float16 in",
        ),
        ("Name: cos, IOMode: Input, DataType: BFloat16", "Name: cos, IOMode: Input, DataType: NVFP5", "NVFP5 in place"),
        (
            "Name: q, IOMode: Output",
            "Name: qq, IOMode: Output",
            "output 'qq' that is not in the contract.*no output 'q'",
        ),
        ("Name: q, IOMode: Output", "Name: q, IOMode: Input", "an input 'q' that is not in the contract"),
        ("Dimensions: [-1,4,64], Location", "Dimensions: [-1,4,65], Location", r"q is \(-1, 4, 65\) in place of"),
        ("Dimensions: [-1,64], Location", "Dimensions: [16,64], Location", r"cos is \(16, 64\) in place of \(-1, 64\)"),
        ("OptShape: [1024,256]", "OptShape: [1023,256]", "hidden has the ranges .*1023, 256.* in place of"),
        ("{ MinShape: [17,256], ", "{ MinShape: [18,256], ", "hidden has the ranges"),
    ],
)
def test_every_part_of_a_description_is_read(description, middle, there, instead, said):
    contract = {"weights": (), "profiles": PROFILES, "what": "it"}
    check_contract(read(description), middle.spec, **contract)
    io = description.index("\nI/O Tensors:\n")
    changed = description[:io] + description[io:].replace(there, instead, 1)
    assert changed != description
    with pytest.raises(ExecutorError, match=said):
        check_contract(read(changed), middle.spec, **contract)


def test_descriptions_that_are_cut_short_or_written_otherwise_are_none(description):
    whole = read(description)
    end = description.index("\n\nEngine Metadata:\n")
    for length in range(0, end, 97):
        assert read(description[:length]) != whole
    for words in ("LayerType", "Constants: [", "Outputs: [", "IOMode", "DataType:", "ProfileInfo", "I/O Tensors"):
        assert read(description.replace(words, "Something: ")) is None, words
    lines = description[:end].split("\n")
    for index, line in enumerate(lines):
        if "Name: " in line:
            assert read("\n".join([*lines[:index], re.sub("Name: ", "", line), *lines[index + 1 :]])) is None
            assert read("\n".join([*lines[:index], *lines[index + 1 :]])) != whole
