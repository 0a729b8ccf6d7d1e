"""The check for who has a card: what it says without one, and all of it on stand-ins for the card."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import verify_card
from scripts.card_check import requirements
from scripts.card_check.engine_runs import Run, Speeds, equal_tokens
from scripts.card_check.segments import results, worst_errors
from scripts.verify_card import DEMO, Outcome, Subject, agrees, table
from tests import stand_in_tensorrt as stand_in
from tests.gemma3_random import write_random_checkpoint
from tests.stand_in_engines import StandInCard, write_engines
from wicore_backend.errors import CheckpointError, WicoreError
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import export_segment, export_segments
from wicore_backend.executor.segments.source import WeightSource
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")


def verify(*args: str) -> subprocess.CompletedProcess[str]:
    script, environment = ROOT / "scripts" / "verify_gpu.sh", os.environ | {"WICORE_PYTHON": sys.executable}
    return subprocess.run([script, *args], capture_output=True, text=True, check=False, env=environment)


@without_card
def test_a_machine_without_a_card_is_told_what_is_missing():
    done = verify()
    assert done.returncode == 2
    assert "This machine cannot run TensorRT engines:" in done.stdout
    assert re.search(r"- PyTorch \S+ is .* and finds no card; pip install torch with CUDA", done.stdout)
    assert "nvidia-smi" in done.stdout


@without_card
def test_each_thing_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(requirements, "_version", lambda _: None)
    monkeypatch.setattr(requirements.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(requirements, "_driver", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    said = requirements.missing()
    things = ("nvidia-smi", "PyTorch", "tensorrt", "OpenAI Triton", "onnx")
    assert len(said) == len(things)
    assert all(thing in line for thing, line in zip(things, said, strict=True))
    assert "nvidia-smi finds no card" in said[0]
    assert any("pip install 'wicore[tensorrt-rtx]'" in line for line in said)
    assert any("no OpenAI Triton" in line for line in said)


@pytest.fixture(scope="module")
def executors(tmp_path_factory):
    """The TensorRT executor on its stand-in, and PyTorch's, with the model's configuration."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(checkpoint, vision={})
    config = Gemma3Config.from_checkpoint(checkpoint)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    exported = export_segments(checkpoint, tmp_path_factory.mktemp("segments"), Precision.FP32)
    library, card = stand_in.library(), StandInCard()
    engines = write_engines(exported, tmp_path_factory.mktemp("engines"), library=library)
    embed = Embedding(weights.text.embedding, device=CPU, residual=torch.float32)
    tensorrt = TensorRTExecutor.load(config, engines, library=library, card=card, embed=embed)
    return tensorrt, TorchExecutor(config, weights), config


def test_segments_of_two_executors_are_compared(executors):
    found, expected, config = executors
    with torch.inference_mode():
        given, right = (results(executor, config, (1, 17)) for executor in (found, expected))
    errors = worst_errors(given, right)
    assert errors.keys() == set(SegmentKind)
    assert max(errors.values()) < 1e-5
    assert len(given) == 2 * (config.text.num_layers + 2)


def test_an_error_in_one_segment_is_found_and_so_is_what_is_no_number(executors):
    _, expected, config = executors
    right = results(expected, config, (3,))
    place = next(place for place in right if place[1].kind is SegmentKind.MID and place[1].layer == 1)
    wrong = dict(right) | {place: tuple(value + 0.5 * value.abs().max() for value in right[place])}
    assert worst_errors(wrong, right)[SegmentKind.MID] == pytest.approx(0.5)
    assert worst_errors(wrong, right)[SegmentKind.LAST] == 0
    nothing = dict(right) | {place: tuple(value * float("nan") for value in right[place])}
    assert worst_errors(nothing, right)[SegmentKind.MID] == float("inf")


def run_of(*answers: tuple[int, ...]) -> Run:
    return Run(answers, Speeds({1: 1.5, 8: 2.5}, 12_345))


def test_tokens_are_equal_as_far_as_the_first_that_differs():
    assert equal_tokens(run_of((1, 2, 3), (4, 5, 6)), run_of((1, 2, 3), (4, 0, 6))) == (4, 6)
    assert equal_tokens(run_of((1, 2, 3)), run_of((1, 2, 3))) == (3, 3)


def test_the_table_has_what_agrees_what_differs_and_what_failed():
    subject = Subject("gemma", Path("model"), Precision.BF16)
    good = Outcome(12.0, 1.5, dict.fromkeys(SegmentKind, 0.01), run_of((1, 2)), run_of((1, 3)))
    bad = replace(good, errors={**good.errors, SegmentKind.MID: float("nan")})
    assert agrees(subject, good)
    assert not agrees(subject, bad)
    said = table({"card": "RTX 4090"}, [(subject, good), (subject, bad), (subject, "no | engine\nfor it")])
    assert "| card | RTX 4090 |" in said
    assert "| equal tokens, greedy | 1 of 2 | 1 of 2 | - |" in said
    assert "| step of 8, ms (torch) | 2.50 (2.50) | 2.50 (2.50) | - |" in said
    assert "| verdict | agrees | DIFFERS | FAILED: no / engine for it |" in said
    widths = {line.count("|") for line in said.splitlines()[4:]}
    assert widths == {5}


@pytest.mark.parametrize(
    ("target", "precisions"),
    [
        ("sm75", ["fp16"]),
        ("sm86", ["bf16", "int4"]),
        ("sm89", ["bf16", "int4", "fp8"]),
        ("sm90", ["bf16", "int4", "fp8"]),
    ],
)
def test_the_demo_model_is_checked_in_what_the_card_has(target, precisions, tmp_path):
    args = verify_card._parser().parse_args(["--model", str(DEMO), "--precision", "bf16"])
    subjects = list(verify_card._subjects(args, target, tmp_path))
    assert [str(subject.precision) for subject in subjects] == [*precisions, "bf16"]
    for subject in subjects:
        subject.make()
        with WeightSource.open(subject.model) as source:
            assert source.quantized == (subject.precision in (Precision.INT4, Precision.FP8))
            found = export_segment(source, Segment(SegmentKind.MID, 0), subject.precision, tmp_path)
        # In few bits the matrices have the very codes that PyTorch multiplies by: nothing is rounded twice.
        assert not source._told, subject
        assert found.nbytes


def test_one_that_cannot_be_made_or_built_costs_no_other_its_row(monkeypatch, capsys):
    def no_room(*_, **__):
        raise CheckpointError("the disk has no room")

    def not_built(subject, *_, **__):
        raise WicoreError(f"{subject.precision} cannot be built")

    monkeypatch.setattr(verify_card, "missing", list)
    monkeypatch.setattr(verify_card, "machine", lambda: {"card": "RTX 4090"})
    monkeypatch.setattr(verify_card.CudaCard, "of", lambda _: SimpleNamespace(compute_capability="sm89"))
    monkeypatch.setattr(verify_card, "quantize", no_room)
    monkeypatch.setattr(verify_card, "_build", not_built)
    monkeypatch.setattr("sys.argv", ["verify_card"])
    with pytest.raises(SystemExit) as ended:
        verify_card.main()
    assert ended.value.code == 1
    verdicts = [row.strip() for row in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    no_room_said = "FAILED: the disk has no room"
    assert verdicts == ["verdict", "FAILED: bf16 cannot be built", no_room_said, no_room_said]


@pytest.mark.parametrize(
    ("options", "said"), [(["--engines", "x"], "name that, too"), (["--rehearse", "--model", "x"], "leave --model out")]
)
def test_options_that_would_be_left_aside_are_refused(options, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["verify_card", *options])
    with pytest.raises(SystemExit) as ended:
        verify_card.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_rehearsal_builds_compares_and_times():
    done = verify("--rehearse")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "| verdict | agrees |" in done.stdout
    assert "serve them" not in done.stderr, "the engines are gone by then"
    assert re.search(r"\| equal tokens, greedy \| (\d+) of \1 \|", done.stdout)
    assert re.search(r"\| error of vision \| \d\.\de-0[5-9] \|", done.stdout)
