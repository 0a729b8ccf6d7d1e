"""The ONNX Runtime executor of a checkpoint on the CPU, for its tests."""

from __future__ import annotations

from pathlib import Path

import torch

from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.onnx_executor import OnnxExecutor
from wicore_backend.executor.onnx_session import OnnxRuntime
from wicore_backend.executor.segments.contract import Precision, segments
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"


def executor_of(checkpoint, directory, *, precision=Precision.FP32, weights="embedded"):
    """The executor of a checkpoint, whose graphs are exported to `directory`."""
    exported = export_segments(checkpoint, directory, precision, weights=weights)
    return opened(checkpoint, exported)


def opened(checkpoint, exported):
    config, precision = Gemma3Config.from_checkpoint(checkpoint), exported.precision
    loaded = load_weights(checkpoint, config, device=CPU, dtype=precision.activations)
    given = {}
    if exported.weights == "inputs":
        given = {segment: bindings(config, loaded, segment, precision) for segment in segments(config)}
    embedding = Embedding(loaded.text.embedding, device=CPU, residual=precision.residual)
    return OnnxExecutor(config, exported, embedding, OnnxRuntime(CPU, threads=1), weights=given)
