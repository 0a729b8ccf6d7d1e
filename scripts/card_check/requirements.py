"""What a machine has to have to run TensorRT engines, and what it has."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.tensorrt.library import load_library

_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader")
_PACKAGES = ("torch", "triton", "transformers", "numpy", "onnx")


def missing() -> list[str]:
    """What is not there, each with what to do; empty if the check can begin."""
    problems = []
    if shutil.which("nvidia-smi") is None:
        problems.append("no NVIDIA driver: nvidia-smi is not on PATH; install the driver of the card, 575 or newer")
    elif _driver() is None:
        problems.append("nvidia-smi finds no card; load the driver, and give the card to this container (--gpus all)")
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is the CPU's"
        problems.append(f"PyTorch {torch.__version__} {built} and finds no card; pip install torch with CUDA")
    try:
        load_library()
    except ExecutorError as error:
        problems.append(str(error))
    if _version("triton") is None:
        problems.append("no OpenAI Triton, by which attention is computed; pip install 'wicore[gpu]'")
    if _version("onnx") is None:
        problems.append("no onnx, by which graphs are exported; pip install 'wicore[onnx]'")
    return problems


def machine() -> Mapping[str, str]:
    """What is there, by its name."""
    there = {"card": _driver() or "none", "processor": platform.processor() or platform.machine()}
    try:
        there["library"] = str(load_library())
    except ExecutorError:
        there["library"] = "none"
    there["python"] = platform.python_version()
    there |= {package: found for package in _PACKAGES if (found := _version(package)) is not None}
    return there | {"CUDA": torch.version.cuda or "none", "system": platform.platform()}


def _driver() -> str | None:
    try:
        done = subprocess.run(_DRIVER_QUERY, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 and done.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
