"""An export goes on where it was, keeps to a bounded memory, and says what is wrong in words that help."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts import random_gemma3
from scripts.write_random_gemma3 import write_checkpoint
from tests.gemma3_random import write_random_checkpoint
from tests.segment_runs import CPU
from wicore_backend.errors import CheckpointError, SegmentError
from wicore_backend.executor.segments import export
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.exclusive import exporting_alone
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.graph import DataFile
from wicore_backend.executor.segments.manifest import SegmentSet

ROOT = Path(__file__).parents[1]
ALL = ["first", "mid_000", "mid_001", "mid_002", "last"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("segments") / "model"
    write_random_checkpoint(path)
    return path


@pytest.fixture
def exported(monkeypatch):
    """Names of segments that were written, as they are."""
    names = []
    original = export.export_segment

    def counted(source, segment, *args, **kwargs):
        file = original(source, segment, *args, **kwargs)
        names.append(segment.name)
        return file

    monkeypatch.setattr(export, "export_segment", counted)
    return names


def test_an_export_that_was_cut_short_goes_on_where_it_was(model, tmp_path, exported):
    def stop(done, total):
        assert 0 < done <= total
        if len(exported) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_segments(model, tmp_path, Precision.FP32, progress=stop)
    with pytest.raises(SegmentError, match=r"has no segments\.json: it holds no complete export; export"):
        SegmentSet.read(tmp_path)
    assert exported == ALL[:3]
    exported.clear()
    calls = []
    complete = export_segments(
        model, tmp_path, Precision.FP32, progress=lambda done, total: calls.append((done, total))
    )
    assert exported == ALL[3:]
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
    assert SegmentSet.read(tmp_path) == complete
    assert [segment.name for segment in complete.files] == ALL
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin"] * 5 + [".json"] + [".onnx"] * 5

    exported.clear()
    assert export_segments(model, tmp_path, Precision.FP32) == complete
    assert exported == []


def test_what_was_damaged_is_exported_again(model, tmp_path, exported):
    complete = export_segments(model, tmp_path, Precision.FP32)
    damaged = complete.files[Segment(SegmentKind.MID, 1)].data
    with damaged.open("rb+") as file:
        file.truncate(100)
    (tmp_path / "last.onnx").unlink()
    exported.clear()
    assert export_segments(model, tmp_path, Precision.FP32) == complete
    assert exported == ["mid_001", "last"]
    assert SegmentSet.read(tmp_path) == complete


def test_another_model_precision_or_place_of_weights_replaces_what_was_there(model, tmp_path, exported):
    export_segments(model, tmp_path / "out", Precision.FP32)
    other = tmp_path / "model"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    exported.clear()
    changed = export_segments(other, tmp_path / "out", Precision.FP32)
    assert exported == ALL
    exported.clear()
    assert export_segments(other, tmp_path / "out", Precision.BF16).fingerprint == changed.fingerprint
    assert exported == ALL
    exported.clear()
    export_segments(other, tmp_path / "out", Precision.BF16, weights="inputs")
    assert exported == ["first", "mid_000", "last"]  # All mid are one graph.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"first.onnx", "mid.onnx", "last.onnx", "segments.json"}


def test_scales_that_were_searched_and_others_are_not_one_set(tmp_path, exported):
    checkpoint = tmp_path / "model"
    write_random_checkpoint(checkpoint, text={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})
    fast = export_segments(checkpoint, tmp_path / "out", Precision.INT4, search=False)
    assert SegmentSet.read(tmp_path / "out") == fast
    assert not fast.searched
    exported.clear()
    assert export_segments(checkpoint, tmp_path / "out", Precision.INT4).searched
    assert exported == ["first", "mid_000", "last"]
    exported.clear()
    export_segments(checkpoint, tmp_path / "out", Precision.INT4)
    assert exported == []
    plain = export_segments(checkpoint, tmp_path / "out", Precision.FP32)
    assert not plain.searched
    exported.clear()
    assert export_segments(checkpoint, tmp_path / "out", Precision.FP32, search=False) == plain
    assert exported == [], "nothing is rounded there"


def test_files_of_others_in_the_directory_stay(model, tmp_path):
    (tmp_path / "notes.bin").write_text("mine")
    (tmp_path / "tensorrt-10-sm89").mkdir()
    (tmp_path / "mid_099.onnx").write_text("of a deeper model")
    export_segments(model, tmp_path, Precision.FP32)
    assert (tmp_path / "notes.bin").read_text() == "mine"
    assert (tmp_path / "tensorrt-10-sm89").is_dir()
    assert not (tmp_path / "mid_099.onnx").exists()


def test_a_full_disk_is_told_and_what_is_complete_stays(model, tmp_path, exported, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(SegmentError, match=r"needs \d+ [kM]B, and its disk has 1 kB free; free some"):
            export_segments(model, tmp_path / "out", Precision.FP32)
    assert exported == []

    original, left = DataFile.append, [3]

    def full(file, octets):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, octets)

    with monkeypatch.context() as patch:
        patch.setattr(DataFile, "append", full)
        with pytest.raises(SegmentError, match=r"mid_000\.onnx cannot be written: No space left on device"):
            export_segments(model, tmp_path / "out", Precision.FP32)
    assert exported == ["first"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first.onnx", "first.bin", "exporting.json"}
    export_segments(model, tmp_path / "out", Precision.FP32)
    assert exported == ALL


def test_a_directory_that_cannot_be_made_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SegmentError, match="file/out cannot be written: Not a directory"):
        export_segments(model, tmp_path / "file" / "out", Precision.FP32)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (Precision.INT4, r"hidden_size is 48, which is no multiple of 32, as matrices in int4 need; choose another"),
        (
            Precision.FP8,
            r"intermediate_size is 84, which is no multiple of 16, as matrices in fp8 need; choose another",
        ),
    ],
)
def test_a_precision_that_the_shape_cannot_have_is_refused_before_anything_is_written(tmp_path, precision, message):
    write_random_checkpoint(tmp_path / "model", text={"intermediate_size": 84})
    with pytest.raises(SegmentError, match=message):
        export_segments(tmp_path / "model", tmp_path / "out", precision)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*No such file"):
        export_segments(tmp_path, tmp_path / "out", Precision.FP32)
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        export_segments(broken, tmp_path / "out", Precision.FP32)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks: text\.layers\.2\.mlp\.down_proj\.weight"):
        export_segments(broken, tmp_path / "out", Precision.FP32)


_PEAK = """
import sys
from pathlib import Path
import torch
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.exclusive import exporting_alone
from wicore_backend.executor.segments.export import export_segments
torch.set_num_threads(1)
exported = export_segments(Path(sys.argv[1]), Path(sys.argv[2]), Precision.BF16)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024, sum(file.nbytes for file in exported.files.values()))
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, monkeypatch):
    shape = random_gemma3.SHAPES["gemma-3-27b"]
    small = shape | {"hidden_size": 896, "intermediate_size": 3584, "num_attention_heads": 6, "num_key_value_heads": 3}
    peaks, sizes = [], []
    # As few as 7 layers are enough to touch all memory that reading takes beside a layer's.
    for layers in (7, 16):
        changed = small | {"num_hidden_layers": layers, "vocab_size": 4096}
        monkeypatch.setitem(random_gemma3.SHAPES, "of so many layers", changed)
        write_checkpoint("of so many layers", tmp_path / "model", device=CPU)
        command = [sys.executable, "-c", _PEAK, str(tmp_path / "model"), str(tmp_path / "out")]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        peak, size = map(int, output.split())
        peaks.append(peak)
        sizes.append(size)
        shutil.rmtree(tmp_path / "model")
        shutil.rmtree(tmp_path / "out")
    layer = (sizes[1] - sizes[0]) / 9
    assert layer > 20e6
    assert abs(peaks[1] - peaks[0]) < layer, (peaks, sizes)


def _command(*args):
    command = [sys.executable, "-m", "scripts.export_segments", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_exports_and_tells_what_is_wrong(model, tmp_path):
    done = _command(model, tmp_path / "out", "--precision", "bf16", "--weights", "inputs")
    assert done.returncode == 0, done.stderr
    assert "bf16: 5 segments, 12 kB, bf16" in done.stdout
    assert SegmentSet.read(tmp_path / "out" / "bf16").weights == "inputs"
    refused = _command(model, tmp_path / "out", "--precision", "int4")
    assert refused.returncode == 1
    assert refused.stderr.startswith("export_segments: hidden_size is 48")
    assert "Traceback" not in refused.stderr
    assert _command(model, tmp_path / "out", "--precision", "int3").returncode == 2


def test_the_command_waits_for_who_exports_there_already(model, tmp_path):
    command = [sys.executable, "-m", "scripts.export_segments", model, tmp_path, "--precision", "fp32"]
    with exporting_alone(tmp_path / "fp32"):
        waiting = subprocess.Popen(
            map(str, command), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        said = waiting.stderr.readline()
        assert said == f"another process writes to {tmp_path / 'fp32'}; waiting for it\n"
        assert [path.name for path in (tmp_path / "fp32").iterdir()] == ["exporting.lock"]
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert SegmentSet.read(tmp_path / "fp32").files
    assert not list(tmp_path.rglob("*.lock"))
    (tmp_path / "file").touch()
    refused = _command(model, tmp_path / "file", "--precision", "fp32")
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        f"export_segments: {tmp_path / 'file' / 'fp32'} cannot be written: Not a directory"
    )
