"""Exported segments in ONNX Runtime, beside the torch executor.

ONNX Runtime's CPU provider has few kernels in 16 bits, so graphs in those types are run in float32 after
`in_float32`, which can round every intermediate result to the type that it had, as a library that fuses nothing would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from wicore_backend.executor.segments.contract import Segment, SegmentKind
from wicore_backend.executor.segments.manifest import SegmentFile, SegmentSet
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import Gemma3Weights

CPU = torch.device("cpu")
_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Step:
    """What a step gives to each of a model's segments, float32."""

    hidden: Tensor
    attention: Tensor
    cos: Tensor
    sin: Tensor
    rows: Tensor
    pixels: Tensor | None

    def inputs(self, segment: Segment) -> tuple[Tensor, ...]:
        match segment.kind:
            case SegmentKind.FIRST:
                return self.hidden, self.cos, self.sin
            case SegmentKind.MID:
                return self.hidden, self.attention, self.cos, self.sin
            case SegmentKind.LAST:
                return self.hidden, self.attention, self.rows
            case SegmentKind.VISION:
                assert self.pixels is not None
                return (self.pixels,)


def random_step(config: Gemma3Config, *, tokens: int = 7, size: float = 1.0, seed: int = 0) -> Step:
    """`size` is how large hidden states and attention's results are."""
    text, random = config.text, torch.Generator().manual_seed(seed)
    angles = torch.rand(tokens, text.head_dim // 2, generator=random).mul_(6.0).repeat(1, 2)
    pixels = None
    if vision := config.vision:
        pixels = torch.randn(2, vision.num_channels, vision.image_size, vision.image_size, generator=random)
    return Step(
        hidden=torch.randn(tokens, text.hidden_size, generator=random).mul_(size),
        attention=torch.randn(tokens, text.num_heads * text.head_dim, generator=random).mul_(size),
        cos=angles.cos(),
        sin=angles.sin(),
        rows=torch.tensor([tokens - 1, 0, tokens // 2]),
        pixels=pixels,
    )


def torch_weights(checkpoint: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Gemma3Config, Gemma3Weights]:
    config = Gemma3Config.from_checkpoint(checkpoint)
    return config, load_weights(checkpoint, config, device=CPU, dtype=dtype)


@torch.inference_mode()
def run_torch(executor: TorchExecutor, segment: Segment, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A segment's results by the torch executor, in float32."""
    dtype = executor.dtype
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)
    match segment.kind:
        case SegmentKind.FIRST:
            results = tuple(executor.first(*inputs))
        case SegmentKind.MID:
            hidden, qkv = executor.mid(segment.layer, *inputs)
            results = (hidden, *qkv)
        case SegmentKind.LAST:
            results = (executor.last(*inputs),)
        case SegmentKind.VISION:
            results = (executor.vision(*inputs),)
    return tuple(value.float() for value in results)


def stored_inputs(file: SegmentFile, step: Step) -> tuple[Tensor, ...]:
    """What a step gives to a segment, rounded to the types that it takes, floating point in float32."""
    rounded = (
        value.to(spec.dtype) for value, spec in zip(step.inputs(file.spec.segment), file.spec.inputs, strict=True)
    )
    return tuple(value.float() if value.is_floating_point() else value for value in rounded)


def run_onnx(
    file: SegmentFile,
    inputs: tuple[Tensor, ...],
    *,
    weights: Mapping[str, Tensor] | None = None,
    rounded: bool = True,
) -> tuple[Tensor, ...]:
    """A segment's results by ONNX Runtime, in float32; graphs in 16 bits run as `in_float32` has them."""
    model = in_float32(onnx.load(file.path), rounded=rounded)
    options = onnxruntime.SessionOptions()
    # Casts to 16 bits and back are the point here, and an optimiser may leave them out.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {spec.name: value.to(spec.dtype) for spec, value in zip(file.spec.inputs, inputs, strict=True)}
    given |= weights or {}
    feeds = {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in given.items()}
    return tuple(torch.from_numpy(value) for value in session.run(None, feeds))


def in_float32(model: onnx.ModelProto, *, rounded: bool) -> onnx.ModelProto:
    """`model` with float32 for float16 and bfloat16; each result is rounded to the type that it had if `rounded`."""
    kinds = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    graph = model.graph
    kinds |= {output.name: output.type.tensor_type.elem_type for output in graph.output}
    for tensor in graph.initializer:
        if tensor.data_type in _HALVES:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _HALVES:
            value.type.tensor_type.elem_type = _FLOAT
    nodes = [node for old in graph.node for node in _in_float32(old, kinds, rounded=rounded)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _in_float32(node: onnx.NodeProto, kinds: Mapping[str, int], *, rounded: bool) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in _HALVES:
            attribute.i = _FLOAT
    halves = [name for name in node.output if kinds[name] in _HALVES] if rounded else []
    exact = {name: f"{name} exact" for name in halves}
    outputs = [exact.get(name, name) for name in node.output]
    del node.output[:]
    node.output.extend(outputs)
    yield node
    for name in halves:
        yield onnx.helper.make_node("Cast", [exact[name]], [f"{name} half"], to=kinds[name])
        yield onnx.helper.make_node("Cast", [f"{name} half"], [name], to=_FLOAT)


def worst_error(results: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to the largest value of the tensor that it is in."""
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert result.isfinite().all()
    return max(
        ((result - reference).abs().max() / reference.abs().max()).item()
        for result, reference in zip(results, references, strict=True)
    )


def errors(
    exported: SegmentSet,
    step: Step,
    reference: Callable[[Segment, tuple[Tensor, ...]], tuple[Tensor, ...]],
    *,
    bindings: Callable[[Segment], Mapping[str, Tensor]] | None = None,
    rounded: bool = True,
) -> dict[str, float]:
    """By segment, how far ONNX Runtime is from `reference`, which is given the same values."""
    found = {}
    for segment, file in exported.files.items():
        inputs = stored_inputs(file, step)
        weights = bindings(segment) if bindings is not None else None
        results = run_onnx(file, inputs, weights=weights, rounded=rounded)
        found[segment.name] = worst_error(results, reference(segment, inputs))
    return found
