"""What an engine takes, gives and is made of, and whether that is what the contract says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import SegmentSpec, TensorSpec
from wicore_backend.executor.tensorrt.library import Library
from wicore_backend.executor.tensorrt.profiles import Profile
from wicore_backend.executor.tensorrt.records import EngineReport, EngineTensor


def report_of_network(
    network: Any,
    profiles: Sequence[Profile],
    spec: SegmentSpec,
    library: Library,
    *,
    weight_bytes: int,
    activations: Sequence[int],
) -> EngineReport:
    """What the library parsed, before it becomes an engine: all that can be known without a card.

    Parameters
    ----------
    network
        The library's `INetworkDefinition`.
    profiles
        That the engine is built with.
    weight_bytes, activations
        What the library said while it built the engine.
    """
    ranges = {tensor.name: tuple(profile.shapes(tensor) for profile in profiles) for tensor in spec.inputs}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    results = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]

    def described(tensor: Any) -> EngineTensor:
        return EngineTensor(
            name=tensor.name,
            dtype=_name(library.dtype(tensor.dtype)),
            shape=tuple(tensor.shape),
            ranges=ranges.get(tensor.name, ()) if tensor.is_network_input else (),
        )

    return EngineReport(
        inputs=tuple(described(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(described(network.get_output(index)) for index in range(network.num_outputs)),
        layers=Counter(layer.type.name.lower() for layer in layers),
        precisions=Counter(_name(library.dtype(result.dtype)) for result in results),
        weight_bytes=weight_bytes,
        activation_bytes=tuple(activations),
    )


def report_of_engine(engine: Any, library: Library) -> EngineReport:
    """What an `ICudaEngine` says of itself. A card has to be there, since only there an engine can be opened."""
    inputs: list[EngineTensor] = []
    outputs: list[EngineTensor] = []
    profiles = range(engine.num_optimization_profiles)
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        taken = engine.get_tensor_mode(name) == library.api.TensorIOMode.INPUT
        shape = tuple(engine.get_tensor_shape(name))
        ranges: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        if taken and -1 in shape:
            for profile in profiles:
                least, usual, most = (tuple(size) for size in engine.get_tensor_profile_shape(name, profile))
                ranges.append((least, usual, most))
        dtype = _name(library.dtype(engine.get_tensor_dtype(name)))
        tensor = EngineTensor(name=name, dtype=dtype, shape=shape, ranges=tuple(ranges))
        (inputs if taken else outputs).append(tensor)
    layers, precisions = _layers(engine, library)
    return EngineReport(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        layers=layers,
        precisions=precisions,
        weight_bytes=_weight_bytes(engine, library),
        activation_bytes=tuple(engine.get_device_memory_size_for_profile_v2(profile) for profile in profiles),
    )


def check_contract(
    report: EngineReport, spec: SegmentSpec, *, weights: Sequence[TensorSpec], profiles: Sequence[Profile], what: str
) -> None:
    """Hold an engine against its segment: names, types, shapes, and the sizes that its profiles allow.

    Parameters
    ----------
    weights
        That are inputs.
    what
        The engine, for the error.

    Raises
    ------
    ExecutorError
        If it differs; names all that does.
    """
    dynamic = {tensor.name for tensor in spec.inputs if any(isinstance(size, str) for size in tensor.shape)}
    problems = [
        *_differences("input", report.inputs, [*spec.inputs, *weights]),
        *_differences("output", report.outputs, spec.outputs),
    ]
    expected = {tensor.name: tensor for tensor in spec.inputs}
    for tensor in report.inputs:
        if tensor.name in dynamic:
            wanted = tuple(profile.shapes(expected[tensor.name]) for profile in profiles)
            if tensor.ranges != wanted:
                problems.append(f"{tensor.name} has the ranges {tensor.ranges} in place of {wanted}")
    if problems:
        raise ExecutorError(f"{what} does not fit the contract of {spec.segment.name}: {'; '.join(problems)}")


def _differences(kind: str, found: Sequence[EngineTensor], wanted: Sequence[TensorSpec]) -> Iterator[str]:
    there, expected = {tensor.name: tensor for tensor in found}, {tensor.name: tensor for tensor in wanted}
    for name in there.keys() - expected.keys():
        yield f"it has an {kind} {name!r} that is not in the contract"
    for name, tensor in expected.items():
        if name not in there:
            yield f"it has no {kind} {name!r}"
            continue
        shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
        if there[name].shape != shape:
            yield f"{name} is {there[name].shape} in place of {shape}"
        if there[name].dtype != _name(tensor.dtype):
            yield f"{name} is {there[name].dtype} in place of {_name(tensor.dtype)}"


def _layers(engine: Any, library: Library) -> tuple[Counter[str], Counter[str]]:
    """Layers by type, and their results by type, as far as the inspector knows them."""
    text = engine.create_engine_inspector().get_engine_information(library.api.LayerInformationFormat.JSON)
    layers: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for layer in json.loads(text).get("Layers", ()):
        if isinstance(layer, str):  # An engine that was built to tell names alone.
            layers["layer"] += 1
            continue
        layers[str(layer.get("LayerType", "layer")).lower()] += 1
        precisions.update(_datatype(result) for result in layer.get("Outputs", ()))
    return layers, precisions


def _datatype(tensor: Mapping[str, object]) -> str:
    """TensorRT-RTX has a key for it, TensorRT has one for it and the layout together."""
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype", "unknown"))


def _weight_bytes(engine: Any, library: Library) -> int:
    """0 where the library is too old to say."""
    if not hasattr(engine, "get_engine_stat"):
        return 0
    return int(engine.get_engine_stat(library.api.EngineStat.TOTAL_WEIGHTS_SIZE))


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
