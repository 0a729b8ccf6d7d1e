"""How INT4 lies in the files of GPTQ, AutoAWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.quantization.base import PLAIN_TYPES, Stored
from wicore_backend.quantization.int4 import SYMMETRIC_ZERO, Int4Matrix

_CODES_A_WORD = 8
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's codes, from its lowest bits, is that of each of eight outputs."""
_GROUP = 128
"""Longer groups are cut into such, which share their scale: the kernels were chosen for it."""


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """`WeightFormat` of GPTQ: words down the inputs.

    Attributes
    ----------
    group
        Inputs that share a scale; None for all of an output's.
    zeros_less_one
        Zero points are stored less one, as GPTQ's first checkpoint format has them.
    """

    group: int | None
    zeros_less_one: bool = True

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, Stored]:
        rows, columns = shape
        groups = _groups(shape, self.group)
        return {
            "qweight": Stored(((_words(shape, columns), rows),), ("I32",)),
            "qzeros": Stored(((groups, _words(shape, rows)),), ("I32",)),
            "scales": Stored(((groups, rows),), PLAIN_TYPES),
            "g_idx": Stored(((columns,),), ("I32",), optional=True),
        }

    def matrix(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], *, dtype: torch.dtype) -> Int4Matrix:
        _refuse_reordered(tensors.get("g_idx"), len(tensors["scales"]))
        codes = _codes(tensors["qweight"]).transpose(1, 2).reshape(shape[1], shape[0])
        zeros = _codes(tensors["qzeros"]).flatten(1)
        if self.zeros_less_one:
            zeros = zeros + 1 & 15
        return _matrix(codes.T, tensors["scales"].T, zeros.T, dtype)


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """`WeightFormat` of AutoAWQ's "gemm": words across the outputs, their codes in an order of its own.

    Attributes
    ----------
    group
        Inputs that share a scale; None for all of an output's.
    """

    group: int | None

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, Stored]:
        rows, columns = shape
        groups, words = _groups(shape, self.group), _words(shape, rows)
        return {
            "qweight": Stored(((columns, words),), ("I32",)),
            "qzeros": Stored(((groups, words),), ("I32",)),
            "scales": Stored(((groups, rows),), PLAIN_TYPES),
        }

    def matrix(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], *, dtype: torch.dtype) -> Int4Matrix:
        codes, zeros = (_codes(tensors[name])[..., _AWQ_ORDER].flatten(1).T for name in ("qweight", "qzeros"))
        assert codes.shape == shape
        return _matrix(codes, tensors["scales"].T, zeros, dtype)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`WeightFormat` of compressed-tensors' "pack-quantized": words along the inputs; also what `tensors` writes.

    Attributes
    ----------
    group
        Inputs that share a scale; None for all of an output's.
    """

    group: int | None

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, Stored]:
        rows, columns = shape
        groups = _groups(shape, self.group)
        return {
            "weight_packed": Stored(((rows, _words(shape, columns)),), ("I32",)),
            "weight_scale": Stored(((rows, groups),), PLAIN_TYPES),
            "weight_zero_point": Stored(
                ((-(-rows // _CODES_A_WORD), groups), (rows, groups)), ("I32", "I8"), optional=True
            ),
            "weight_shape": Stored(((2,),), ("I64", "I32"), optional=True),
            "weight_g_idx": Stored(((columns,),), ("I32",), optional=True),
        }

    def matrix(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], *, dtype: torch.dtype) -> Int4Matrix:
        rows = shape[0]
        if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
            raise ValueError(f"a weight_shape of {tensors['weight_shape'].tolist()} in place of {list(shape)}")
        scales = tensors["weight_scale"]
        _refuse_reordered(tensors.get("weight_g_idx"), scales.shape[1])
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            if zeros.dtype == torch.int8:
                zeros = zeros + SYMMETRIC_ZERO
            elif len(zeros) == -(-rows // _CODES_A_WORD):
                zeros = _codes(zeros).transpose(1, 2).flatten(0, 1)[:rows]
            else:
                raise ValueError(f"a weight_zero_point of {list(zeros.shape)} that is not in whole words")
            if not (zeros.shape == scales.shape and bool((zeros >= 0).all()) and bool((zeros < 16).all())):
                raise ValueError("a weight_zero_point outside of four bits")
        return _matrix(_codes(tensors["weight_packed"]).flatten(1), scales, zeros, dtype)


def packed_tensors(matrix: Int4Matrix) -> dict[str, Tensor]:
    """`matrix` as "pack-quantized" stores it, by names after the module's."""
    codes, scales, zeros = matrix.unpacked()
    tensors = {
        "weight_packed": _packed(codes),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, device=codes.device),
    }
    if zeros is not None:
        padded = torch.nn.functional.pad(zeros.to(torch.uint8).T, (0, -len(zeros) % _CODES_A_WORD))
        tensors["weight_zero_point"] = _packed(padded).T.contiguous()
    return tensors


def _matrix(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Int4Matrix:
    if not bool(scales.isfinite().all()):
        raise ValueError("a scale that is not finite")
    scales = scales if scales.dtype.itemsize == 2 else scales.to(dtype)
    group = codes.shape[1] // scales.shape[1]
    if group > _GROUP and group % _GROUP == 0:
        scales = scales.repeat_interleave(group // _GROUP, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(group // _GROUP, 1)
    return Int4Matrix.packed(codes.contiguous(), scales, None if zeros is None else zeros.to(scales.dtype), dtype)


def _refuse_reordered(g_idx: Tensor | None, groups: int) -> None:
    """ValueError if the inputs of a group do not lie side by side, as after GPTQ's `desc_act` or `actorder` "group"."""
    if g_idx is not None and not torch.equal(
        g_idx.cpu(), torch.arange(len(g_idx), dtype=g_idx.dtype) // (len(g_idx) // groups)
    ):
        raise ValueError("groups of inputs that do not lie side by side: quantise without desc_act (activation order)")


def _codes(words: Tensor) -> Tensor:
    """The eight codes of each of int32 `words`, from the lowest bits: uint8 [..., 8]."""
    octets = words.reshape(-1).view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), -1).view(*words.shape, _CODES_A_WORD)


def _packed(codes: Tensor) -> Tensor:
    """`codes` uint8 [..., n] in words int32 [..., n / 8]."""
    octets = codes[..., ::2] | codes[..., 1::2] << 4
    return octets.reshape(-1).view(torch.int32).view(*codes.shape[:-1], -1)


def _groups(shape: tuple[int, ...], group: int | None) -> int:
    if group is not None and shape[1] % group:
        raise CheckpointError(f"a matrix of {shape[1]} inputs cannot have groups of {group}; quantise in smaller ones")
    groups = 1 if group is None else shape[1] // group
    if shape[1] // groups * (2 - groups % 2) % _CODES_A_WORD:  # One, or two that lie together: see `Int4Matrix`.
        raise CheckpointError(f"a matrix of {shape[1]} inputs in {groups} groups is not read; take groups of 128")
    return groups


def _words(shape: tuple[int, ...], codes: int) -> int:
    if codes % _CODES_A_WORD:
        raise CheckpointError(f"a matrix of {list(shape)} cannot be stored in whole words of eight codes")
    return codes // _CODES_A_WORD
