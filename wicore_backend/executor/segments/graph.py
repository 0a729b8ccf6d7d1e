"""Writes an ONNX graph: nodes with names that a person can follow, weights streamed to a file or declared as inputs.

Only operators of the standard set are used, at the opset that brought RMSNormalization and Attention. TensorRT's parser
knows both from 10.15 on (https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md), TensorRT-RTX's from 1.7.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from wicore_backend.executor.segments.contract import TensorSpec

try:
    import onnx
except ModuleNotFoundError:
    raise ModuleNotFoundError("onnx, which writes graphs, is not installed; pip install 'wicore[onnx]'") from None

OPSET = 23
_IR_VERSION = 11
"""The first of opset 23 (https://onnx.ai/onnx/repo-docs/Versioning.html)."""
_PRODUCER = "wicore"
_INLINE_BYTES = 4096
"""Up to which a tensor stands in the graph itself."""
_ALIGNMENT = 4096
"""Of a tensor in the data file: a page, so that it can be mapped."""
_AT_ONCE = 64 << 20
"""Bytes that are handed to the file at a time."""

_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
    torch.int64: onnx.TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a graph, by the name that it has there."""

    name: str
    dtype: torch.dtype


class DataFile:
    """A file of large tensors, one after another; a context that ends with all of it on the disk.

    Parameters
    ----------
    name
        What graphs call the file, which is written under another name until it is whole.
    """

    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.name = name
        self._file = path.open("wb")

    def append(self, octets: Tensor) -> tuple[int, int]:
        """Write contiguous `octets` uint8; returns the byte at which they begin, and their number."""
        start = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(start)
        for part in torch.split(octets.view(-1), _AT_ONCE):
            self._file.write(part.numpy().data)
        return start, octets.numel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class Graph:
    """A graph that grows node by node.

    Parameters
    ----------
    data
        Gets the weights; None to declare them as inputs instead, for which tensors on the `meta` device will do.
    """

    def __init__(self, name: str, data: DataFile | None) -> None:
        self.weights: dict[str, Tensor] = {}
        """Weights that were declared as inputs, in order, by name."""
        self._name = name
        self._data = data
        self._nodes: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._casts: dict[tuple[str, torch.dtype], Value] = {}

    def input(self, spec: TensorSpec) -> Value:
        self._inputs.append(_value_info(spec))
        return Value(spec.name, spec.dtype)

    def output(self, value: Value, spec: TensorSpec) -> None:
        """Give `value` out, under the name and in the type of `spec`."""
        if value.dtype == spec.dtype:
            self.add("Identity", value, name=spec.name)
        else:
            self.add("Cast", value, name=spec.name, dtype=spec.dtype, to=_TYPES[spec.dtype])
        self._outputs.append(_value_info(spec))

    def add(
        self, operator: str, *inputs: Value, name: str, dtype: torch.dtype | None = None, **attributes: Any
    ) -> Value:
        """A node called `name`, whose one result is called so too, in `dtype` or the first input's type."""
        assert name not in self._nodes, f"{name} is in the graph already"
        self._nodes[name] = onnx.helper.make_node(operator, [v.name for v in inputs], [name], name=name, **attributes)
        return Value(name, dtype or inputs[0].dtype)

    def split(self, value: Value, sizes: Sequence[int], names: Sequence[str], *, axis: int) -> tuple[Value, ...]:
        """Parts of `value` along `axis`."""
        node = onnx.helper.make_node(
            "Split",
            [value.name, self.integers(*sizes).name],
            list(names),
            name=f"split {' '.join(names)}",
            axis=axis,
        )
        self._nodes[node.name] = node
        return tuple(Value(name, value.dtype) for name in names)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """`value` in `dtype`: itself, if that is its type."""
        if value.dtype == dtype:
            return value
        key = value.name, dtype
        if key not in self._casts:
            name = f"{value.name}.as_{_short(dtype)}"
            self._casts[key] = self.add("Cast", value, name=name, dtype=dtype, to=_TYPES[dtype])
        return self._casts[key]

    def integers(self, *values: int) -> Value:
        """A constant int64 [n]."""
        return self.constant(torch.tensor(values), name=f"integers {' '.join(map(str, values))}")

    def number(self, value: float, dtype: torch.dtype) -> Value:
        """A constant without axes."""
        return self.constant(torch.tensor(value, dtype=dtype), name=f"{value!r} {_short(dtype)}")

    def constant(self, tensor: Tensor, *, name: str) -> Value:
        """A small tensor within the graph; one that is there already by that name is taken again."""
        if name not in self._initializers:
            self._initializers[name] = self._inline(name, _TYPES[tensor.dtype], tuple(tensor.shape), _octets(tensor))
        return Value(name, tensor.dtype)

    def weight(self, name: str, tensor: Tensor) -> Value:
        """One of the model's tensors: kept with the graph, or declared as an input."""
        if self._data is None:
            assert name not in self.weights, f"{name} is an input already"
            self.weights[name] = tensor
            return self.input(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        self._keep(name, _TYPES[tensor.dtype], tuple(tensor.shape), _octets(tensor))
        return Value(name, tensor.dtype)

    def int4_weight(self, name: str, nibbles: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """Signed values of four bits, two in each of `nibbles` uint8, the first in the lower half.

        PyTorch has no name for the type: `dtype` stands for what it is widened to.
        """
        self._keep(name, onnx.TensorProto.INT4, shape, nibbles)
        return Value(name, dtype)

    def save(self, path: Path) -> None:
        """Write the graph without its large tensors."""
        graph = onnx.helper.make_graph(
            list(self._nodes.values()), self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opset = onnx.helper.make_opsetid("", OPSET)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name=_PRODUCER)
        path.write_bytes(model.SerializeToString())

    def _keep(self, name: str, kind: int, shape: tuple[int, ...], octets: Tensor) -> None:
        assert self._data is not None, f"{name} cannot be an input of a graph"
        assert name not in self._initializers, f"{name} is in the graph already"
        if octets.numel() <= _INLINE_BYTES:
            self._initializers[name] = self._inline(name, kind, shape, octets)
            return
        offset, length = self._data.append(octets)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": self._data.name, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor

    @staticmethod
    def _inline(name: str, kind: int, shape: tuple[int, ...], octets: Tensor) -> Any:
        return onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=octets.numpy().tobytes())


class Scope:
    """Adds nodes to a graph under a common beginning of their names, as in `layer.5.gate_up`."""

    def __init__(self, graph: Graph, prefix: str) -> None:
        self.graph = graph
        self._prefix = prefix

    def __call__(
        self, operator: str, *inputs: Value, name: str, dtype: torch.dtype | None = None, **attributes: Any
    ) -> Value:
        return self.graph.add(operator, *inputs, name=self.name(name), dtype=dtype, **attributes)

    def name(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def weight(self, name: str, tensor: Tensor) -> Value:
        return self.graph.weight(self.name(name), tensor)

    def split(self, value: Value, sizes: Sequence[int], names: Sequence[str], *, axis: int) -> tuple[Value, ...]:
        return self.graph.split(value, sizes, [self.name(name) for name in names], axis=axis)

    def reshape(self, value: Value, *sizes: int, name: str) -> Value:
        return self("Reshape", value, self.graph.integers(*sizes), name=name)

    def scaled(self, value: Value, factor: float, *, name: str) -> Value:
        """`value` times `factor`: itself, if that is 1."""
        return value if factor == 1 else self("Mul", value, self.graph.number(factor, value.dtype), name=name)

    def wide(self, value: Value) -> Value:
        """`value` in float32."""
        return self.graph.cast(value, torch.float32)


def _value_info(spec: TensorSpec) -> Any:
    return onnx.helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape))


def _octets(tensor: Tensor) -> Tensor:
    """The tensor's memory, uint8, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
