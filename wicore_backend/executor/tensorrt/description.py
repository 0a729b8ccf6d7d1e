"""What the library says of an engine that it has just built.

TensorRT-RTX opens an engine only where a card is. But as it ends building one, it logs what its inspector would print
of it: the layers that became of the network, and inputs and outputs with the shapes of each profile. That is the engine
itself, on a machine that could not open it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from wicore_backend.executor.tensorrt.records import EngineReport, EngineTensor, Shape

_TYPES: Mapping[str, str] = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "Int4": "INT4",
    "Int8": "int8",
    "UInt8": "uint8",
    "Int32": "int32",
    "Int64": "int64",
    "Bool": "bool",
}
_LAYER = re.compile(
    r"Name: .*, LayerType: (?P<type>\w+), Inputs: \[.*\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], TacticName: .*"
)
_DATATYPE = re.compile(r"\bDatatype: (\w+)")
_TENSOR = re.compile(
    r" Name: (?P<name>.+), IOMode: (?P<mode>Input|Output), DataType: (?P<type>\w+), "
    r"Dimensions: \[(?P<shape>[-\d,]*)\], .*\bProfileInfo: \[(?P<profiles>.*)\]"
)
_RANGE = re.compile(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]")


def report_of_description(description: str, *, weight_bytes: int, activations: Sequence[int]) -> EngineReport | None:
    """What the library said of an engine that it built; None if any of that is not as TensorRT-RTX 1.7 writes it.

    Parameters
    ----------
    description
        `Messages.description`.
    weight_bytes, activations
        What it said besides.
    """
    layers, _, rest = description.removeprefix("Layers:\n").partition("\nI/O Tensors:\n")
    tensors, _, _ = rest.partition("\n\n")
    types: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for line in filter(None, layers.split("\n")):
        layer = _LAYER.fullmatch(line)
        if layer is None:
            return None
        types[layer["type"]] += 1
        precisions.update(map(_type, _DATATYPE.findall(layer["constants"] + layer["outputs"])))
    sides: Mapping[str, list[EngineTensor]] = {"Input": [], "Output": []}
    for line in filter(None, tensors.split("\n")):
        tensor = _TENSOR.fullmatch(line)
        if tensor is None:
            return None
        sides[tensor["mode"]].append(_tensor(tensor))
    if not sides["Input"] or not sides["Output"]:
        return None
    return EngineReport(
        inputs=tuple(sides["Input"]),
        outputs=tuple(sides["Output"]),
        layers=types,
        precisions=precisions,
        weight_bytes=weight_bytes,
        activation_bytes=tuple(activations),
    )


def _tensor(found: re.Match[str]) -> EngineTensor:
    shape = _shape(found["shape"])
    ranges = [(_shape(least), _shape(usual), _shape(most)) for least, usual, most in _RANGE.findall(found["profiles"])]
    return EngineTensor(
        name=found["name"], dtype=_type(found["type"]), shape=shape, ranges=tuple(ranges) if -1 in shape else ()
    )


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split(",") if size)


def _type(name: str) -> str:
    """PyTorch's name, or the library's where PyTorch has no such type."""
    return _TYPES.get(name, name)
