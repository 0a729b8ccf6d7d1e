"""Where the ONNX Runtime executor's graphs come from, what can be wrong with them, and what else its process has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import onnx
import onnxruntime
import pytest
import torch

from tests.gemma3_random import write_random_checkpoint
from tests.onnx_kit import CPU, DEMO, executor_of, opened
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import executor_loading, exporting
from wicore_backend.engine.exporting import exported_segments
from wicore_backend.errors import EngineError, ExecutorError, SegmentError
from wicore_backend.executor.onnx_session import OnnxRuntime, OnnxSegment, cuda_options
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.models.gemma3.checkpoint import CheckpointReader

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(path, vision={})
    return path


def settings_of(checkpoint, engines):
    return EngineConfig(model=checkpoint, device="cpu", engines=engines)


def test_graphs_are_exported_once_and_the_other_weights_are_not_read(tmp_path, monkeypatch):
    settings = EngineConfig(model=DEMO, device="cpu", executor="onnx", engines=tmp_path / "engines", threads=1)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with Engine(settings) as engine:
        first = engine.generate("hello", params).token_ids
    assert (tmp_path / "engines" / "fp32" / "segments.json").exists()

    def nobody(*_args, **_kwargs):
        raise AssertionError("that takes time and memory, and is not needed")

    monkeypatch.setattr(exporting, "export_segments", nobody)
    monkeypatch.setattr(executor_loading, "load_weights", nobody)
    for part in ("layer", "vision", "head"):
        monkeypatch.setattr(CheckpointReader, part, nobody)
    (tmp_path / "engines" / "fp32").chmod(0o500)
    with Engine(settings) as engine:
        assert engine.generate("hello", params).token_ids == first


def test_of_many_that_start_at_once_one_exports(checkpoint, tmp_path, monkeypatch):
    exports = []
    export = exporting.export_segments

    def slow(*args, **kwargs):
        exports.append(threading.get_ident())
        return export(*args, **kwargs)

    monkeypatch.setattr(exporting, "export_segments", slow)
    found, began = [], threading.Barrier(6)

    def start():
        began.wait()
        found.append(exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded"))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(exports) == 1
    assert all(each == found[0] for each in found)


def test_an_export_that_was_cut_short_is_finished_by_the_next_start(checkpoint, tmp_path, monkeypatch):
    export = exporting.export_segments

    def cut_short(*args, **kwargs):
        def progress(done, total):
            if done > total / 3:
                raise KeyboardInterrupt

        return export(*args, **{**kwargs, "progress": progress})

    monkeypatch.setattr(exporting, "export_segments", cut_short)
    with pytest.raises(KeyboardInterrupt):
        exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")
    assert not (tmp_path / "fp32" / "segments.json").exists()
    monkeypatch.undo()
    exported = exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")
    opened(checkpoint, exported)


def test_a_place_that_cannot_be_written_is_an_error_that_names_the_setting(checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ExecutorError, match=f"exported to {tmp_path / 'file' / 'fp32'}: .*set engines to"):
        exported_segments(settings_of(checkpoint, tmp_path / "file"), Precision.FP32, weights="embedded")


def test_graphs_of_another_checkpoint_are_refused(checkpoint, tmp_path):
    write_random_checkpoint(tmp_path / "other", vision={}, seed=9)
    export_segments(tmp_path / "other", tmp_path / "fp32", Precision.FP32)
    with pytest.raises(SegmentError, match=f"{tmp_path / 'fp32'} holds segments in fp32 of checkpoint .*remove that"):
        exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")


def damaged_graph(directory):
    path = directory / "mid_001.onnx"
    path.write_bytes(b"\x08" * path.stat().st_size)


def damaged_shape(directory):
    path = directory / "last.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value += 1
    onnx.save(model, path)


def renamed_output(directory):
    path = directory / "first.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["quux" if name == "q" else name for name in node.output]
    model.graph.output[0].name = "quux"
    onnx.save(model, path)
    manifest = directory / "segments.json"
    content = json.loads(manifest.read_text())
    content["segments"][0]["bytes"] = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_graph, "cannot load .*mid_001.onnx: .*; remove .* to have the segments exported again"),
        (damaged_shape, "cannot load .*last.onnx: .*; remove .* to have the segments exported again"),
        (renamed_output, "first.onnx gives q as nothing in place of .*; remove"),
        (lambda d: (d / "vision.onnx").unlink(), "lacks vision.onnx"),
        (lambda d: (d / "first.bin").unlink(), "first.onnx"),
        (lambda d: (d / "segments.json").write_text("{}"), "segments.json"),
    ],
)
def test_damaged_files_are_errors_that_name_the_file_and_the_remedy(checkpoint, tmp_path, damage, said):
    directory = tmp_path / "fp32"
    export_segments(checkpoint, directory, Precision.FP32)
    damage(directory)
    with pytest.raises(SegmentError, match=said):
        opened(checkpoint, exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded"))


def test_segments_of_a_model_of_another_shape_are_refused(checkpoint, tmp_path):
    write_random_checkpoint(tmp_path / "other", text={"hidden_size": 64}, vision={})
    exported = export_segments(tmp_path / "other", tmp_path / "graphs", Precision.FP32)
    with pytest.raises(SegmentError, match="holds first of another model"):
        opened(checkpoint, exported)


def test_weights_that_are_missing_or_of_another_shape_are_refused(checkpoint, tmp_path):
    exported = export_segments(checkpoint, tmp_path, Precision.FP32, weights="inputs")
    file = exported.files[Segment(SegmentKind.FIRST)]
    runtime = OnnxRuntime(CPU, threads=1)
    session = runtime.open(file.path)
    with pytest.raises(SegmentError, match=r"first.onnx takes .* as torch\.float32 \[.*\], and there is none"):
        OnnxSegment(runtime, session, file, {})
    weights = {spec.name: torch.zeros(3) for spec in file.weights}
    with pytest.raises(SegmentError, match=r"and there is torch\.float32 \[3\]"):
        OnnxSegment(runtime, session, file, weights)


def test_a_tensor_of_another_type_or_order_is_refused_before_it_is_read(checkpoint, tmp_path):
    executor = executor_of(checkpoint, tmp_path)
    hidden, cos = torch.zeros(4, 48), torch.zeros(4, 16)
    with pytest.raises(EngineError, match=r"first: cos is torch\.float16 .* in place of torch\.float32"):
        executor.first(hidden, cos.half(), cos)
    with pytest.raises(EngineError, match=r"first: hidden is .* with strides \(1, 4\)"):
        executor.first(torch.zeros(48, 4).T, cos, cos)


def test_a_gpu_takes_the_package_for_gpus():
    with pytest.raises(ExecutorError, match="computes on CPUs alone; pip install onnxruntime-gpu in its place"):
        OnnxRuntime(torch.device("cuda", 0), threads=1)
    options = cuda_options(torch.device("cuda", 1), 4711)
    assert (options["device_id"], options["user_compute_stream"], options["use_tf32"]) == ("1", "4711", "0")


def test_others_in_the_process_that_use_onnx_runtime_are_left_alone(checkpoint, tmp_path):
    exported = export_segments(checkpoint, tmp_path, Precision.FP32)
    opened(checkpoint, exported)
    theirs = onnxruntime.SessionOptions()
    theirs.intra_op_num_threads = 2
    path = exported.files[Segment(SegmentKind.FIRST)].path
    assert onnxruntime.InferenceSession(path, theirs, providers=["CPUExecutionProvider"]).get_inputs()


def test_nobody_is_told_what_is_computed(tmp_path):
    exported = export_segments(DEMO, tmp_path / "graphs", Precision.FP32)
    told = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}  # By each of which it is silent.
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / ".cache")}
    open_graph = (
        "import sys, pathlib, torch; from wicore_backend.executor.onnx_session import OnnxRuntime; "
        "OnnxRuntime(torch.device('cpu'), threads=1).open(pathlib.Path(sys.argv[1]))"
    )
    graph = exported.files[Segment(SegmentKind.FIRST)].path
    subprocess.run([sys.executable, "-c", open_graph, graph], check=True, env=environment, cwd=DEMO.parents[1])
    # Where it notes the machine's number and what it has not yet sent.
    assert not [*(tmp_path / "home").rglob("*onnxruntime*")]
