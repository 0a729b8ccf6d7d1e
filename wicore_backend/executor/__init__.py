"""What computes a model's dense segments: PyTorch, ONNX Runtime or TensorRT."""

import os

# ONNX Runtime's published packages tell Microsoft of every graph that is opened, with a number for the machine kept in
# ~/.cache, unless this is set before they are imported (since 1.29). Nobody who serves a model asked for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
