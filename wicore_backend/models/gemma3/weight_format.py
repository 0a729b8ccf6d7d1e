"""How a checkpoint's matrices are stored, as the `quantization_config` in its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from wicore_backend.models.gemma3.config_fields import ConfigFields
from wicore_backend.processor.checkpoint_files import read_json
from wicore_backend.quantization.base import WeightFormat
from wicore_backend.quantization.fp8 import Fp8Format
from wicore_backend.quantization.int4_formats import AwqFormat, GptqFormat, PackedFormat


def weight_format(directory: Path) -> WeightFormat | None:
    """How the checkpoint in `directory` stores what it quantised; None if it quantised nothing.

    Raises
    ------
    CheckpointError
        If it is a way that is not read; names the key, the value seen and those that are.
    """
    path = directory / "config.json"
    top = ConfigFields(path, read_json(path))
    if "quantization_config" not in top:
        return None
    fields = top.section("quantization_config")
    return _METHODS[fields.choice("quant_method", tuple(_METHODS))](fields)


def _compressed_tensors(fields: ConfigFields) -> WeightFormat:
    """https://github.com/vllm-project/compressed-tensors, version 0.9 and later."""
    read_format = _COMPRESSED_FORMATS[fields.choice("format", tuple(_COMPRESSED_FORMATS))]
    formats = {read_format(group) for group in fields.section("config_groups").sections()}
    if len(formats) != 1:
        raise fields.error("config_groups", "groups that store their weights in one way")
    return formats.pop()


def _float_quantized(group: ConfigFields) -> WeightFormat:
    weights = group.section("weights")
    weights.choice("type", ("float",))
    if weights.integer("num_bits") != 8:
        raise weights.error("num_bits", "8")
    weights.choice("strategy", ("channel", "tensor"))
    return Fp8Format()


def _pack_quantized(group: ConfigFields) -> WeightFormat:
    weights = group.section("weights")
    weights.choice("type", ("int",))
    _four(weights, "num_bits")
    by_group = weights.choice("strategy", ("group", "channel")) == "group"
    return PackedFormat(weights.integer("group_size") if by_group else None)


def _gptq(fields: ConfigFields) -> WeightFormat:
    """https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/ModelCloud/GPTQModel"""
    _four(fields, "bits")
    version = fields.choice("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    return GptqFormat(_group_size(fields), zeros_less_one=version == "gptq")


def _awq(fields: ConfigFields) -> WeightFormat:
    """https://github.com/casper-hansen/AutoAWQ"""
    _four(fields, "bits")
    fields.choice("version", ("gemm",), default="gemm")
    return AwqFormat(_group_size(fields))


def _four(fields: ConfigFields, key: str) -> None:
    if fields.integer(key) != 4:
        raise fields.error(key, "4")


def _group_size(fields: ConfigFields) -> int | None:
    """Inputs that share a scale; None where all do, which is written as -1."""
    size = fields.integer("group_size", minimum=-1)
    if size == 0:
        raise fields.error("group_size", "-1 or a positive integer")
    return None if size == -1 else size


_COMPRESSED_FORMATS: Mapping[str, Callable[[ConfigFields], WeightFormat]] = {
    "float-quantized": _float_quantized,
    "naive-quantized": _float_quantized,  # What early versions called it.
    "pack-quantized": _pack_quantized,
}
_METHODS: Mapping[str, Callable[[ConfigFields], WeightFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
