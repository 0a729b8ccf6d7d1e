"""What of a model is quantised in each precision, how, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.manifest import WeightsAs
from wicore_backend.executor.segments.matrices import FP8_INPUTS, INT4_GROUPS, Keeping, keeps_codes, kept
from wicore_backend.executor.segments.source import ShapeParts, WeightSource
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import LayerEnd, LayerStart, VisionWeights, Weight, plain
from wicore_backend.quantization.base import QuantizedMatrix
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import Int4Matrix

_KEEPING: dict[Precision, Keeping] = {Precision.INT4: "int4", Precision.FP8: "fp8"}
_MULTIPLES: dict[Precision, int] = {Precision.INT4: INT4_GROUPS[-1], Precision.FP8: FP8_INPUTS}


class KeptParts:
    """`Parts` of a source, matrices of the decoder's layers as a precision keeps them.

    The head stays as it is in 16 bits, unless the checkpoint has it in the precision's own way. A matrix that is
    quantised otherwise is widened and rounded again, which the source tells once.
    """

    def __init__(self, source: WeightSource, precision: Precision, *, search: bool) -> None:
        self._source = source
        self._precision = precision
        self._keeping = _KEEPING.get(precision, "plain")
        self._dtype = precision.activations
        self._parts = source.parts(self._dtype)
        self._search = search

    def layer_start(self, index: int) -> LayerStart:
        start = self._parts.layer_start(index)
        return replace(start, qkv=self._kept(start.qkv, f"layer {index}'s QKV"))

    def layer_end(self, index: int) -> LayerEnd:
        end = self._parts.layer_end(index)
        return replace(
            end,
            out=self._kept(end.out, f"layer {index}'s output projection"),
            gate_up=self._kept(end.gate_up, f"layer {index}'s gate and up"),
            down=self._kept(end.down, f"layer {index}'s down projection"),
        )

    def norm(self) -> Tensor:
        return self._parts.norm()

    def head(self) -> Weight:
        head = self._parts.head()
        own_way = (isinstance(head, Int4Matrix) and self._keeping == "int4" and keeps_codes(head)) or (
            isinstance(head, Fp8Matrix) and self._keeping == "fp8"
        )
        return head if own_way else self._in_range(plain(head, self._dtype), "the head")

    def vision(self) -> VisionWeights:
        return self._parts.vision()

    def _kept(self, weight: Weight, what: str) -> Weight:
        try:
            result = kept(weight, self._keeping, self._dtype, search=self._search)
        except ValueError as error:
            raise SegmentError(f"{what} cannot be in {self._precision}: {error}; choose another precision") from None
        if isinstance(result, Tensor):
            return self._in_range(result, what)
        if not isinstance(weight, Tensor) and result is not weight:
            self._source.tell_once(f"the checkpoint has {_described(weight)}: rounded again, to {_described(result)}")
        return result

    def _in_range(self, matrix: Tensor, what: str) -> Tensor:
        if self._precision is Precision.FP16 and not bool(matrix.isfinite().all()):
            raise SegmentError(
                f"{what} holds values beyond {torch.finfo(self._dtype).max:,.0f}, where float16 ends; choose bf16"
            )
        return matrix


def check_fits(config: Gemma3Config, precision: Precision) -> None:
    """SegmentError if a plain model of this shape cannot be in `precision`."""
    text, multiple = config.text, _MULTIPLES.get(precision, 1)
    inputs = {
        "hidden_size": text.hidden_size,
        "num_attention_heads x head_dim": text.num_heads * text.head_dim,
        "intermediate_size": text.intermediate_size,
    }
    for name, size in inputs.items():
        if size % multiple:
            raise SegmentError(
                f"{name} is {size}, which is no multiple of {multiple}, as matrices in {precision} need; "
                "choose another precision"
            )


def kept_bytes(config: Gemma3Config, segment: Segment, precision: Precision, weights: WeightsAs) -> int:
    """About how many bytes of weights a segment has within."""
    if weights == "inputs":
        return 0
    return sum(
        round(tensor.numel() * (_bits(precision) if quantized else 8 * tensor.dtype.itemsize) / 8)
        for tensor, quantized in _tensors(config, segment, precision)
    )


def _tensors(config: Gemma3Config, segment: Segment, precision: Precision) -> Iterator[tuple[Tensor, bool]]:
    """Large tensors, and whether they are quantised where anything is."""
    parts = ShapeParts(config, precision.activations)
    if segment.kind in (SegmentKind.FIRST, SegmentKind.MID):
        yield _plain(parts.layer_start(0).qkv), True
    if segment.kind in (SegmentKind.MID, SegmentKind.LAST):
        end = parts.layer_end(0)
        yield from ((_plain(matrix), True) for matrix in (end.out, end.gate_up, end.down))
    if segment.kind is SegmentKind.LAST:
        yield _plain(parts.head()), False
    if segment.kind is SegmentKind.VISION:
        vision = parts.vision()
        yield from ((tensor, False) for tensor in (vision.patches.weight, vision.positions, vision.projection))
        for layer in vision.layers:
            yield from ((affine.weight, False) for affine in (layer.qkv, layer.out, layer.up, layer.down))


def _plain(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def _bits(precision: Precision) -> float:
    """That a value of a decoder's matrix takes, scales included."""
    if precision is Precision.INT4:
        return 4 + 16 / INT4_GROUPS[0]
    return 8 if precision is Precision.FP8 else 8 * precision.activations.itemsize


def _described(matrix: QuantizedMatrix) -> str:
    if isinstance(matrix, Int4Matrix):
        return f"INT4 in groups of {matrix.group} {'without' if matrix.zeros is None else 'with'} zero points"
    return "FP8" if isinstance(matrix, Fp8Matrix) else type(matrix).__name__
