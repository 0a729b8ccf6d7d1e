"""Codecs: how a KV block is written to a colder tier, and read back.

A codec is bound to one shape and dtype of blocks. What it writes of a block has a fixed size and means nothing to
anybody else; its `fingerprint` belongs into that of whatever stores it.

    exact   the bytes themselves, NaN and infinities included
    fp8     e4m3, scaled by the largest magnitude of each layer's keys or values of a head
    q8      8 bits, scaled by the largest magnitude of each run of 64 values: one token's head, or part of it
    q4      4 bits between a minimum and a maximum: of keys those of each channel over 16 tokens, of values those of
            128 values of a head

Keys have channels that are large in all tokens, values have not: hence keys by channel and values by token (KIVI,
arXiv:2402.02750). With 16 tokens a block, two 16-bit numbers a channel would be half as many bytes as the keys, so q4
stores a channel's range in one byte: from which to which 15th of the range of the whole head in these tokens.

What the lossy codecs promise:

- Finite values stay finite. NaN becomes 0, an infinity the dtype's largest number of that sign.
- Each value's error is bounded: see the codecs. A group of zeros is exact; so is, in fp8 and q8, the largest magnitude
  of a group, and in q4 the smallest and largest value of a group of values.
- The same values give the same bytes, whatever blocks are beside them. fp8 and q8 give them on every device, since they
  use correctly rounded operations only; in q4 a value in the middle between two codes may get either.
- fp8 and q8: what was decoded decodes to the same after a second time, so that a block that comes and goes does not
  fade. Not so the keys of q4, whose ranges may tighten; each time adds an error within the same bound.

All computing is in float32: by PyTorch's operators, a few MiB at a time, or on a GPU by `kernels`, in one pass.
"""

from __future__ import annotations

from typing import get_args

import torch

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs.base import BlockShape, Codec, CodecName
from wicore_backend.hmt.codecs.exact import ExactCodec
from wicore_backend.hmt.codecs.q4 import Q4Codec
from wicore_backend.hmt.codecs.scaled import Fp8Codec, Q8Codec

__all__ = ["BlockShape", "Codec", "CodecName", "make_codec"]

_CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (ExactCodec, Fp8Codec, Q8Codec, Q4Codec)}


def make_codec(name: CodecName, shape: BlockShape, dtype: torch.dtype) -> Codec:
    """The codec called `name` for blocks of one shape and dtype.

    Raises
    ------
    InvalidArgumentError
        For an unknown name, a dtype that is no KV dtype, or a shape that is no block's.
    """
    if name not in _CODECS:
        raise InvalidArgumentError(f"codec = {name!r} is unknown; it is one of {', '.join(get_args(CodecName))}")
    return _CODECS[name](shape, dtype)
