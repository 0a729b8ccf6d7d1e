"""What recorded steps take of the device, to be set aside before the KV cache gets the rest."""

from __future__ import annotations

from wicore_backend.engine.segments import token_counts
from wicore_backend.models.gemma3.config import TextConfig

_WORKSPACE_BYTES = 2**27
"""cuBLAS', for the streams on which steps are recorded and replayed."""

_GRAPH_BYTES = 2**17
"""Of the driver's own, for each graph of a few kernels."""


def graph_bytes(text: TextConfig, *, max_running: int, max_batch_tokens: int, value_bytes: int) -> int:
    """About what the CUDA graphs of a model's steps take, if all can be recorded.

    Steps are recorded in one another's memory (`CudaRecorder`), so that the widest one's activations count; each size
    has its rotations, its plan and its graphs for itself.
    """
    counts = token_counts(max_batch_tokens)
    widest = max(max_running, counts[-1])
    heads = text.qkv_heads * text.head_dim
    activations = widest * (3 * text.intermediate_size + 2 * heads + 8 * text.hidden_size) * value_bytes
    logits = max_running * text.vocab_size * (4 + value_bytes)
    inputs = 4 * sum(counts) * (heads + text.hidden_size) * value_bytes
    return activations + logits + inputs + _WORKSPACE_BYTES + len(counts) * text.num_layers * _GRAPH_BYTES
