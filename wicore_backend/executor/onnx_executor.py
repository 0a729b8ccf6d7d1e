"""Dense segments by ONNX Runtime, from the graphs that an export wrote: on a CPU, or on CUDA where its package is.

What goes in and comes out are PyTorch's tensors, where they are: ONNX Runtime is given their addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from wicore_backend.errors import SegmentError
from wicore_backend.executor.base import QKV
from wicore_backend.executor.between import Between
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.onnx_session import OnnxRuntime, OnnxSegment, again
from wicore_backend.executor.segments.contract import Segment, SegmentKind, SegmentSpec, segment_spec, segments
from wicore_backend.executor.segments.manifest import SegmentSet
from wicore_backend.models.gemma3.config import Gemma3Config

Bindings = Mapping[Segment, Mapping[str, Tensor]]
"""Of each segment the tensors that are its weights, by the names of its inputs."""


class OnnxExecutor:
    """`Executor` of an exported set of segments. To be used under `torch.inference_mode()`, on one thread.

    Queries, keys and values stay where they are until the next segment is computed, hidden states until the one after
    that.

    Parameters
    ----------
    weights
        What a set whose weights are inputs is given; nothing for one that has them within.

    Raises
    ------
    SegmentError
        If a segment is missing, cannot be read, or does not take and give what this model's does.
    ExecutorError
        If ONNX Runtime cannot compute on the device.
    """

    def __init__(
        self,
        config: Gemma3Config,
        exported: SegmentSet,
        embedding: Embedding,
        runtime: OnnxRuntime,
        *,
        weights: Bindings | None = None,
    ) -> None:
        self.device = runtime.device
        self.dtype = exported.precision.activations
        self.residual = exported.precision.residual
        self.recordable = False
        self.embed = embedding
        found = _segments(config, exported, runtime, weights or {})
        self._first = found[Segment(SegmentKind.FIRST)]
        self._mids = [found[Segment(SegmentKind.MID, layer)] for layer in range(config.text.num_layers - 1)]
        self._last = found[Segment(SegmentKind.LAST)]
        self._vision = found.get(Segment(SegmentKind.VISION))
        text = config.text
        self._vocab_size = text.vocab_size
        if config.vision is not None:
            self._pixels_shape = config.vision.num_channels, *[config.vision.image_size] * 2
        self._soft_tokens_shape = config.mm_tokens_per_image, text.hidden_size
        self._make_room = partial(Between.of, config, exported.precision, device=self.device)
        self._between = self._of_step = self._make_room(tokens=0)

    def first(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        """See `Executor.first`."""
        qkv = self._room(len(hidden)).qkv
        self._first.run((hidden, cos, sin), qkv)
        return qkv

    def mid(self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, QKV]:
        """See `Executor.mid`."""
        room = self._room(len(hidden))
        following = room.after(layer)
        self._mids[layer].run((hidden, attention, cos, sin), (following, *room.qkv))
        return following, room.qkv

    def last(self, hidden: Tensor, attention: Tensor, rows: Tensor) -> Tensor:
        """See `Executor.last`."""
        logits = torch.empty(len(rows), self._vocab_size, device=self.device)
        self._last.run((hidden, attention, rows.long()), (logits,))
        return logits

    def vision(self, pixels: Tensor) -> Tensor:
        """See `Executor.vision`."""
        assert self._vision is not None, "a text-only model sees no pictures"
        soft_tokens = torch.empty(len(pixels), *self._soft_tokens_shape, dtype=self.residual, device=self.device)
        self._vision.run((pixels.contiguous(),), (soft_tokens,))
        return soft_tokens

    def rehearse(self, *, tokens: int, pictures: int) -> None:
        """Compute steps of so many tokens and pictures once, for what ONNX Runtime takes of the device's memory."""
        room = self._room(tokens)
        hidden, rotation = room.hidden[0], self._zeros(tokens, room.qkv.q.shape[2])
        attention = self._zeros(tokens, room.qkv.q[0].numel())
        self.first(hidden, rotation, rotation)
        for layer in range(len(self._mids)):
            hidden, _ = self.mid(layer, hidden, attention, rotation, rotation)
        self.last(hidden, attention, torch.zeros(1, dtype=torch.int64, device=self.device))
        if self._vision is not None:
            self.vision(self._zeros(pictures, *self._pixels_shape))

    def _room(self, tokens: int) -> Between:
        """Memory for what a step of so many tokens leaves between its segments: the same for the same number."""
        if len(self._of_step) != tokens:
            if len(self._between) < tokens:
                self._between = self._make_room(tokens=tokens)
            self._of_step = self._between.first(tokens)
        return self._of_step

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=self.dtype, device=self.device)


def _segments(
    config: Gemma3Config, exported: SegmentSet, runtime: OnnxRuntime, weights: Bindings
) -> dict[Segment, OnnxSegment]:
    """All of the model's. Those of one file, which differ in the weights that they are given, share its session."""
    sessions: dict[Path, onnxruntime.InferenceSession] = {}
    found = {}
    for segment in segments(config):
        file = exported.files.get(segment)
        wanted = segment_spec(config, segment, exported.precision)
        if file is None or not _alike(file.spec, wanted):
            raise SegmentError(
                f"{exported.directory} holds {segment.name} of another model, or none; {again(exported.directory)}"
            )
        if file.path not in sessions:
            sessions[file.path] = runtime.open(file.path)
        found[segment] = OnnxSegment(runtime, sessions[file.path], file, weights.get(segment, {}))
    return found


def _alike(spec: SegmentSpec, wanted: SegmentSpec) -> bool:
    """Whether they take and give the same; with weights as inputs, another layer's segment is as good."""
    return (spec.inputs, spec.outputs) == (wanted.inputs, wanted.outputs)
