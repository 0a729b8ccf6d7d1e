"""Serving needs no package beyond those of pyproject.toml's `serve`: tests have more, and would not miss one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = """
import sys
for name in ("onnx", "onnxruntime", "ml_dtypes", "tensorrt_rtx_bindings", "transformers", "triton"):
    sys.modules[name] = None  # importing it now fails
import wicore_backend.triton.wire
from wicore_backend import Engine, EngineConfig, SamplingParams
with Engine(EngineConfig(model=sys.argv[1], device="cpu", threads=1, executor=sys.argv[2])) as engine:
    print(engine.generate("What is 12 + 7?", SamplingParams(max_tokens=8, temperature=0)).text)
"""


def run(executor: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ANSWERS, str(ROOT / "models" / "wicore-demo"), executor]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_an_engine_answers_with_the_packages_for_serving(executor):
    done = run(executor)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "19"


def test_a_command_whose_packages_are_missing_says_which():
    missing = (
        "import runpy, sys; sys.modules['onnx'] = None; runpy.run_module('scripts.build_engines', None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", missing], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = "build_engines: onnx, which writes graphs, is not installed; pip install 'wicore[onnx]'\n"
    assert done.stderr == said


def test_an_executor_whose_packages_are_missing_says_which():
    done = run("onnx")
    assert done.returncode != 0
    assert "pip install 'wicore[onnx]'" in done.stderr, done.stderr
