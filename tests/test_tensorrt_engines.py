"""Engines built here, by the real TensorRT-RTX, for cards that are not here; and how they are kept and found."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import (
    Precision,
    Segment,
    SegmentKind,
    SegmentSpec,
    TensorSpec,
    segment_spec,
)
from wicore_backend.executor.segments.export import export_segment
from wicore_backend.executor.segments.manifest import SegmentFile
from wicore_backend.executor.segments.source import WeightSource
from wicore_backend.executor.tensorrt import building
from wicore_backend.executor.tensorrt.building import BuildOptions, Target, build_engine
from wicore_backend.executor.tensorrt.inspection import check_contract
from wicore_backend.executor.tensorrt.library import Library, LibraryName, load_library
from wicore_backend.executor.tensorrt.profiles import Range, profiles_for, profiles_of
from wicore_backend.executor.tensorrt.records import EngineKey, EngineManifest
from wicore_backend.executor.tensorrt.store import EngineFolder, EngineStore, Wanted, read_engine, read_manifest

DEMO = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
KINDS = [
    Segment(SegmentKind.FIRST),
    Segment(SegmentKind.MID, 3),
    Segment(SegmentKind.LAST),
    Segment(SegmentKind.VISION),
]
FIRST = KINDS[0]
PROFILES = profiles_for(max_running=16, max_batch_tokens=2048)


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def demo():
    with WeightSource.open(DEMO) as source:
        yield source


@pytest.fixture(scope="module")
def graphs(demo, tmp_path_factory):
    """Exported segments, each once."""
    made = {}

    def exported(segment, precision, weights="embedded"):
        key = segment, precision, weights
        if key not in made:
            made[key] = export_segment(
                demo, segment, precision, tmp_path_factory.mktemp("graphs"), weights=weights, search=False
            )
        return made[key]

    return exported


@pytest.fixture
def build(library, tmp_path):
    def built(file, *, target="sm89", precision=Precision.BF16, profiles=PROFILES, **options):
        path = tmp_path / "engines" / f"{file.spec.segment.name}.engine"
        wanted = Target(library.name, target, precision)
        return build_engine(file, path, target=wanted, profiles=profiles, library=library, **options)

    return built


# Profiles


@pytest.mark.parametrize("max_running", [1, 7, 64, 1024, 3000])
@pytest.mark.parametrize("max_batch_tokens", [66, 512, 1024, 1025, 8192])
def test_each_number_of_tokens_is_in_one_profile(max_running, max_batch_tokens):
    profiles = profiles_for(max_running=max_running, max_batch_tokens=max_batch_tokens)
    for tokens in (*range(1, 200), 1023, 1024, 1025, max_batch_tokens):
        if tokens <= max_batch_tokens:
            assert sum(tokens in profile.tokens for profile in profiles) == 1
    assert profiles[-1].tokens.max == max_batch_tokens
    assert all(profile.rows.max <= max_batch_tokens for profile in profiles)


def test_profiles_of_the_defaults():
    decode, prompts = profiles_for(max_running=64, max_batch_tokens=512)
    assert (decode.tokens, prompts.tokens) == (Range(1, 16, 64), Range(65, 512, 512))
    assert decode.rows.max == 128, "guesses as well"


# What is built


@pytest.mark.parametrize("segment", KINDS, ids=lambda segment: segment.kind)
@pytest.mark.parametrize(
    ("precision", "target", "weights"),
    [
        (Precision.BF16, "sm89", "embedded"),
        (Precision.BF16, "sm120", "embedded"),
        (Precision.FP16, "sm75", "embedded"),
        (Precision.INT4, "sm89", "embedded"),
        (Precision.FP8, "sm89", "embedded"),
        (Precision.BF16, "sm89", "inputs"),
    ],
)
def test_engines_are_as_the_contract_says(graphs, build, demo, tmp_path, segment, precision, target, weights):
    file = graphs(segment, precision, weights)
    record = build(file, target=target, precision=precision)
    report, spec = record.report, segment_spec(demo.config, segment, precision)

    names = {tensor.name: (tensor.dtype, tensor.shape) for tensor in (*report.inputs, *report.outputs)}
    for tensor in (*spec.inputs, *spec.outputs, *file.weights):
        shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
        assert names.pop(tensor.name) == (str(tensor.dtype).removeprefix("torch."), shape)
    assert not names, "no more than that"
    ours = profiles_of(spec, PROFILES)
    letter = spec.inputs[0].shape[0]
    ranges = report.inputs[0].ranges
    assert [(least[0], usual[0], most[0]) for least, usual, most in ranges] == [
        (r.min, r.opt, r.max) for r in (profile.range(letter) for profile in ours)
    ]
    assert len(report.activation_bytes) == len(ours)
    assert all(report.activation_bytes)

    expected = {Precision.INT4: "INT4", Precision.FP8: "float8_e4m3fn", Precision.FP16: "float16"}.get(precision)
    if segment.kind is not SegmentKind.VISION:
        assert report.precisions[expected or "bfloat16"] > 0
    assert report.layers["shape_call"] == len(ours), "of the engine, one for each profile; a network has none"
    assert "dequantize" not in report.layers, "matrices are widened within products"
    if precision is Precision.FP16:
        assert "bfloat16" not in report.precisions, "this card has none"
    if weights == "inputs":
        assert report.weight_bytes < 4096
        assert record.nbytes < 4 << 20
    with read_engine(tmp_path / "engines", record) as content:
        assert content[:4] == b"vtrt"


def test_int4_engines_have_a_quarter_of_the_weights(graphs, build):
    middle = KINDS[1]
    int4, bf16 = (build(graphs(middle, p), precision=p).report.weight_bytes for p in (Precision.INT4, Precision.BF16))
    assert 0.25 < int4 / bf16 < 0.30


def test_options_reach_the_library(graphs, build):
    streaming = build(graphs(FIRST, Precision.BF16), options=BuildOptions(weight_streaming=True))
    assert streaming.report.weight_bytes > 0
    build(graphs(FIRST, Precision.BF16), options=BuildOptions(threads=2))


@pytest.fixture
def tiny(tmp_path):
    """A graph of one operator and its segment, which says that it gives y of x."""

    def written(operator, *, output="y", dtype=TensorProto.BFLOAT16, width=64, **attributes):
        inputs = ["x", "x"] if operator == "Add" else ["x"]
        node = helper.make_node(operator, inputs, [output], name="the_node", **attributes)
        tensors = [helper.make_tensor_value_info(name, dtype, ["T", width]) for name in ("x", output)]
        graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
        path = tmp_path / "first.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
        spec = SegmentSpec(
            FIRST,
            (TensorSpec("x", torch.bfloat16, ("T", 64)),),
            (TensorSpec("y", torch.bfloat16, ("T", 64)),),
        )
        return SegmentFile(spec, path, (), path.stat().st_size)

    return written


def test_what_cannot_be_parsed_names_segment_node_and_message(tiny, build):
    with pytest.raises(ExecutorError, match=r"cannot parse first, .*node 'the_node' \(Unique\): unsupported_node: "):
        build(tiny("Unique"))
    file = tiny("Add")
    file.path.write_bytes(b"nonsense" * 100)
    with pytest.raises(ExecutorError, match=r"cannot parse first, .*model_deserialize_failed"):
        build(file)
    file.path.unlink()
    with pytest.raises(ExecutorError, match=r"cannot parse first, .*cannot be found"):
        build(file)


def test_what_cannot_be_built_names_segment_target_and_message(tiny, build, tmp_path):
    with pytest.raises(ExecutorError, match=r"could not build first in bf16 for sm75: .*HW-specific datatypes: b16"):
        build(tiny("Add"), target="sm75")
    with pytest.raises(ExecutorError, match=r"cannot build for sm90, only for"):
        build(tiny("Add"), target="sm90")
    assert not (tmp_path / "engines").exists()


def test_tensorrt_itself_builds_for_the_card_that_is_there_alone(tiny, library, tmp_path, monkeypatch):
    names = {name: getattr(library.api, name) for name in dir(library.api) if name != "ComputeCapability"}
    plain = Library(LibraryName.TENSORRT, "10.16", SimpleNamespace(**names))
    target = Target(plain.name, "sm90", Precision.BF16)
    path = tmp_path / "engines" / "first.engine"
    for here, said in ((None, "not there"), ("sm89", "sm89")):
        monkeypatch.setattr(building, "_card_here", lambda here=here: here)
        with pytest.raises(
            ExecutorError, match=rf"builds for the card that it runs on, which is {said}, and not for sm90"
        ):
            build_engine(tiny("Add"), path, target=target, profiles=PROFILES, library=plain)


class Measuring:
    """A library that times kernels, as far as timings go: it builds by the real one, and takes only its own cache."""

    def __init__(self, real, attached):
        self._real = real
        self._attached = attached

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __setattr__(self, name, value):
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._real, name, value)

    def create_timing_cache(self, content):
        return SimpleNamespace(content=content, serialize=lambda: b"mine, and more")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch, "timings of another card are worth nothing"
        if not cache.content or cache.content.startswith(b"mine"):
            self._attached.append(cache.content)
            return True
        return False


@pytest.mark.parametrize("there", [None, b"mine", b"of another card"])
def test_timings_are_kept_and_those_of_another_card_are_not(tiny, library, tmp_path, monkeypatch, there):
    attached, timings = [], tmp_path / "timings.cache"
    if there is not None:
        timings.write_bytes(there)
    configure = building._configure
    monkeypatch.setattr(Library, "times_kernels", True)
    # The builder wants its own kind of config, which the stand-in wraps until then.
    monkeypatch.setattr(building, "_configure", lambda *args: Measuring(configure(*args), attached))
    builders = library.api.Builder

    class Builder(builders):
        def build_serialized_network(self, network, config):
            return super().build_serialized_network(network, config._real)

    api = SimpleNamespace(**{name: getattr(library.api, name) for name in dir(library.api)} | {"Builder": Builder})
    path = tmp_path / "engines" / "first.engine"
    target = Target(library.name, "sm89", Precision.BF16)
    build_engine(
        tiny("Add"), path, target=target, profiles=PROFILES, library=replace(library, api=api), timing_cache=timings
    )
    assert attached == [b"mine" if there == b"mine" else b""]
    assert timings.read_bytes() == b"mine, and more"


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        ({"output": "z"}, r"it has an output 'z' that is not in the contract; it has no output 'y'"),
        ({"dtype": TensorProto.FLOAT16}, r"x is float16 in place of bfloat16; y is float16 in place of bfloat16"),
        ({"width": 32}, "x"),
    ],
)
def test_graphs_that_break_the_contract_make_no_engine(tiny, build, tmp_path, graph, said):
    with pytest.raises(ExecutorError, match=said):
        build(tiny("Add", **graph))
    assert not (tmp_path / "engines").exists()


def test_ranges_are_part_of_the_contract(tiny, build):
    file = tiny("Add")
    report = build(file).report
    check_contract(report, file.spec, weights=(), profiles=PROFILES, what="it")
    others = profiles_for(max_running=17, max_batch_tokens=2048)
    with pytest.raises(ExecutorError, match="it does not fit the contract of first: x has the ranges"):
        check_contract(report, file.spec, weights=(), profiles=others, what="it")


def test_a_disk_that_takes_no_engine_is_told(tiny, library, tmp_path):
    (tmp_path / "engines").write_text("a file, where the directory should be")
    with pytest.raises((ExecutorError, OSError), match="engines"):
        build_engine(
            tiny("Add"),
            tmp_path / "engines" / "first.engine",
            target=Target(library.name, "sm89", Precision.BF16),
            profiles=PROFILES,
            library=library,
        )


# How they are kept

KEY = EngineKey(
    model="ab" * 32,
    precision=Precision.BF16,
    library=LibraryName.TENSORRT_RTX,
    version="1.7.1.116",
    compute_capability="sm89",
    profiles=PROFILES,
)
WANTED = Wanted(
    model=KEY.model,
    precision=None,
    library=KEY.library,
    version=KEY.version,
    compute_capability="sm89",
    card="NVIDIA GeForce RTX 4090",
    max_running=16,
    max_batch_tokens=2048,
    segments=[FIRST],
)


@pytest.fixture
def kept(tiny, library, tmp_path):
    """An engine of one segment, in its folder, for any key."""

    def put(key=KEY, root=tmp_path / "store"):
        folder = EngineFolder.open(root, key)
        target = Target(library.name, "sm89", key.precision)
        path = folder.path(FIRST)
        folder.add(build_engine(tiny("Add"), path, target=target, profiles=PROFILES, library=library))
        return folder

    return put


def test_engines_are_found_by_what_they_were_built_for(kept, tmp_path):
    folder = kept()
    found = EngineStore(tmp_path / "store").find(WANTED)
    assert found.directory == folder.directory == tmp_path / "store" / "bf16" / "tensorrt_rtx-1.7.1.116-sm89"
    assert found.key == KEY
    assert found.engines[FIRST] == folder.records[0]
    with found.read(found.engines[FIRST]) as content:
        assert content[:4] == b"vtrt"
    assert EngineStore(tmp_path / "store").find(replace(WANTED, max_batch_tokens=100)).key == KEY, "less is covered"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "cd" * 32}, r"of another checkpoint \(abababababab instead of cdcdcdcdcdcd\)"),
        ({"precision": Precision.INT4}, "in bf16 instead of int4"),
        ({"library": LibraryName.TENSORRT}, "for tensorrt_rtx instead of tensorrt"),
        ({"version": "1.8"}, r"of tensorrt_rtx 1\.7\.1\.116 instead of 1\.8"),
        ({"compute_capability": "sm75", "card": "Tesla T10"}, "for sm89, and this card, Tesla T10, is sm75"),
        ({"max_batch_tokens": 4096}, "for steps of 2048 tokens, and max_batch_tokens = 4096"),
        ({"segments": [FIRST, Segment(SegmentKind.LAST)]}, "not finished: 1 of 2 are missing, last first"),
    ],
)
def test_stale_engines_are_named_with_what_differs_and_the_command(kept, tmp_path, change, said):
    kept()
    wanted = replace(WANTED, **change)
    with pytest.raises(ExecutorError, match=said) as refused:
        EngineStore(tmp_path / "store").find(wanted)
    command = str(refused.value).split("build them: ")[1]
    assert command.startswith(f"python -m scripts.build_engines MODEL --target {wanted.compute_capability} ")
    assert f"--max-batch-tokens {wanted.max_batch_tokens}" in command
    assert f"--library {'rtx' if wanted.library is LibraryName.TENSORRT_RTX else 'tensorrt'}" in command


def test_engines_that_were_timed_on_another_card_are_stale(tmp_path):
    EngineFolder.open(tmp_path, KEY)
    assert WANTED.objections(KEY.model_copy(update={"card": "NVIDIA L20"})) == [
        "timed on NVIDIA L20, and this card is NVIDIA GeForce RTX 4090"
    ]
    assert not WANTED.objections(KEY.model_copy(update={"card": WANTED.card}))
    assert WANTED.objections(KEY.model_copy(update={"contract": 0})) == ["of contract 0 instead of 1"]


def test_an_empty_store_says_so(tmp_path):
    with pytest.raises(ExecutorError, match="has none at all; build them"):
        EngineStore(tmp_path / "nothing").find(WANTED)


def test_the_most_exact_precision_is_taken_first(kept, tmp_path):
    for precision in (Precision.INT4, Precision.BF16, Precision.FP8):
        kept(KEY.model_copy(update={"precision": precision}))
    store = EngineStore(tmp_path / "store")
    assert store.find(WANTED).key.precision is Precision.BF16
    assert store.find(replace(WANTED, precision=Precision.FP8)).key.precision is Precision.FP8
    assert [folder.parent.name for folder in store.folders()] == ["bf16", "fp8", "int4"]


def test_a_build_goes_on_where_it_was(kept, tmp_path):
    folder = kept()
    last = Segment(SegmentKind.LAST)
    again = EngineFolder.open(tmp_path / "store", KEY)
    assert again.missing([FIRST, last]) == [last]
    path = folder.path(FIRST)
    path.write_bytes(path.read_bytes()[:-1])
    assert again.missing([FIRST, last]) == [FIRST, last], "cut short by a crash of the machine, say"


@pytest.mark.parametrize(
    "change", [{"profiles": profiles_for(max_running=2, max_batch_tokens=99)}, {"model": "ef" * 8}]
)
def test_engines_of_another_key_are_given_up_only_if_asked_and_it_is_said_why(kept, tmp_path, caplog, change):
    kept()
    other = KEY.model_copy(update=change)
    with pytest.raises(ExecutorError, match=r"has 1 engines of another kind \(.* instead of .*--engines.*--replace"):
        EngineFolder.open(tmp_path / "store", other)
    assert EngineFolder.open(tmp_path / "store", KEY).records
    with caplog.at_level(logging.WARNING):
        folder = EngineFolder.open(tmp_path / "store", other, replace=True)
    assert not folder.records
    assert "instead of" in caplog.text
    assert folder.key != KEY


def test_engines_of_an_older_contract_are_built_anew(kept, tmp_path, caplog):
    kept()
    with caplog.at_level(logging.WARNING):
        newer = EngineFolder.open(tmp_path / "store", KEY.model_copy(update={"contract": KEY.contract + 1}))
    assert not newer.records
    assert "contract" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"format": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"format": 2, "key": {"model": "../../etc"}}).encode(),
    ],
)
def test_manifests_that_are_none_are_refused_and_replaced(kept, tmp_path, caplog, content):
    folder = kept()
    (folder.directory / "engines.json").write_bytes(content)
    with pytest.raises(ExecutorError, match=r"engines\.json is no list of engines \(.*\); build them again"):
        read_manifest(folder.directory)
    with pytest.raises(ExecutorError, match=r"no TensorRT engines for this model.*engines\.json is no list"):
        EngineStore(tmp_path / "store").find(WANTED)
    with caplog.at_level(logging.WARNING):
        again = EngineFolder.open(tmp_path / "store", KEY)
    assert again.missing([FIRST]) == [FIRST]
    assert "is no list of engines" in caplog.text


@pytest.mark.parametrize("name", ["../outside.engine", "/etc/passwd", "a.engine/../b.engine", "A.engine", ""])
def test_manifests_name_files_beside_them_only(kept, name):
    folder = kept()
    content = json.loads((folder.directory / "engines.json").read_bytes())
    content["engines"][0]["file"] = name
    with pytest.raises(ExecutorError, match=r"engines\.0\.file"):
        EngineManifest.parse(json.dumps(content).encode(), "engines.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("key", "version"), "1/../../2"),
        (("key", "compute_capability"), "sm89/x"),
        (("key", "profiles", 0, "tokens", "min"), 99),
        (("key", "profiles", 0, "tokens", "max"), "many"),
        (("key", "profiles"), []),
        (("key", "precision"), "fp5"),
        (("engines", 0, "segments"), []),
        (("engines", 0, "digest"), "0" * 31),
        (("engines", 0, "nbytes"), -1),
        (("engines", 0, "report", "activation_bytes"), [1.5]),
        (("extra",), 1),
    ],
)
def test_manifests_with_values_that_cannot_be_are_refused(kept, place, value):
    content = json.loads((kept().directory / "engines.json").read_bytes())
    part = content
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    with pytest.raises(ExecutorError, match=str(place[0])):
        EngineManifest.parse(json.dumps(content).encode(), "engines.json")


def test_a_manifest_that_is_too_large_is_not_read(kept):
    folder = kept()
    with (folder.directory / "engines.json").open("ab") as file:
        file.truncate(1 << 25)
    with pytest.raises(ExecutorError, match="far too large"):
        read_manifest(folder.directory)
