"""The codec of 4 bits a value: keys by channel, values by token."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wicore_backend.hmt.codecs.base import (
    LEAST,
    BlockKernels,
    BlockShape,
    Codec,
    bytes_of,
    copy_finite,
    divisor_up_to,
    numbers_of,
)

if TYPE_CHECKING:
    from wicore_backend.hmt.codecs.kernels.launching import Blocks

_KEY_TOKENS = 16
_VALUE_GROUP = 128
_MAX = 2.0**126
"""The difference of two such numbers is finite in float32."""


class Q4Codec(Codec):
    """Error of a value: at most a 30th of its range, and half a unit in the dtype's last place. The range of a value is
    that of its group; that of a key is its channel's, rounded outwards to 15ths of the head's.

    A layer's record is, in this order: the codes of keys, two a byte, the keys' channel ranges, a byte each, the
    keys' head ranges, the codes of values, two a byte, and the values' ranges. Magnitudes over 2**126 count as 2**126.
    """

    name = "q4"

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        _, _, tokens, heads, dim = shape
        run = _divisor_from(tokens, _KEY_TOKENS)
        self._keys = (tokens // run, run, heads, dim)
        width = divisor_up_to(dim, _VALUE_GROUP)
        rows = _divisor_from(tokens, -(-_VALUE_GROUP // width))
        self._values = (tokens // rows, rows, heads, dim // width, width)
        super().__init__(shape, dtype)

    def _sections(self) -> list[int]:
        codes = -(-prod(self.shape[2:]) // 2)
        runs, _, heads, dim = self._keys
        groups, _, _, parts, _ = self._values
        pair = 2 * self.dtype.itemsize
        return [codes, runs * heads * dim, runs * heads * pair, codes, groups * heads * parts * pair]

    def _layer_bytes(self) -> int:
        return sum(self._sections())

    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        key_codes, channels, heads, value_codes, ranges = records.split_with_sizes(self._sections(), 1)
        finite, work = scratch[0], scratch[1].view(2, len(layers), -1)
        copy_finite(layers, finite).clamp_(-_MAX, _MAX)

        keys = finite[:, 0].view(-1, *self._keys)  # [n, runs, tokens, heads, d]
        low, high = keys.amin(2, keepdim=True), keys.amax(2, keepdim=True)
        least, most = low.amin(4, keepdim=True), high.amax(4, keepdim=True)
        first = _position(low, least, most).mul_(15).floor_()
        last = _position(high, least, most).mul_(15).ceil_()
        low, high = torch.lerp(least, most, first / 15), torch.lerp(least, most, last / 15)
        places = _position(keys, low, high, out=work[0].view_as(keys))
        _store_nibbles(places.mul_(15).round_(), key_codes)
        channels.copy_(first.add_(last, alpha=16).flatten(1))
        heads.copy_(bytes_of(torch.stack((least, most), 1).to(self.dtype)))

        values = finite[:, 1].view(-1, *self._values)  # [n, groups, tokens, heads, parts, width]
        least, most = values.amin((2, 5), keepdim=True), values.amax((2, 5), keepdim=True)
        places = _position(values, least, most, out=work[1].view_as(values))
        _store_nibbles(places.mul_(15).round_(), value_codes)
        ranges.copy_(bytes_of(torch.stack((least, most), 1).to(self.dtype)))

    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        key_codes, channels, heads, value_codes, ranges = records.split_with_sizes(self._sections(), 1)
        work = scratch[0].view(2, len(layers), -1)
        runs, _, count, dim = self._keys
        least, most = numbers_of(heads, self.dtype).view(-1, 2, runs, 1, count, 1).unbind(1)
        ends = channels.view(-1, runs, 1, count, dim)
        low = torch.lerp(least, most, (ends & 15).to(torch.float32).div_(15))
        high = torch.lerp(least, most, (ends >> 4).to(torch.float32).div_(15))
        places = work[0].view(-1, *self._keys)
        _load_nibbles(key_codes, work[0]).div_(15)
        layers[:, 0].view(-1, *self._keys).copy_(torch.lerp(low, high, places, out=places))

        groups, _, count, parts, _ = self._values
        least, most = numbers_of(ranges, self.dtype).view(-1, 2, groups, 1, count, parts, 1).unbind(1)
        places = work[1].view(-1, *self._values)
        _load_nibbles(value_codes, work[1]).div_(15)
        layers[:, 1].view(-1, *self._values).copy_(torch.lerp(least, most, places, out=places))

    def _make_kernels(self, blocks: Blocks) -> BlockKernels | None:
        from wicore_backend.hmt.codecs.kernels.q4 import Q4Kernels

        _, run, _, _ = self._keys
        _, rows, _, _, width = self._values
        return Q4Kernels.for_blocks(blocks, sections=self._sections(), run=run, group=(rows, width), largest=_MAX)


def _position(values: Tensor, low: Tensor, high: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where from `low` (0) to `high` (1) values are, or at the nearer end; 0 in a range that is a point."""
    width = high - low
    return torch.sub(values, low, out=out).div_(width.clamp_(min=LEAST)).clamp_(0, 1)


def _store_nibbles(codes: Tensor, packed: Tensor) -> None:
    """Write whole numbers from 0 to 15 [n, ...] to uint8 [n, ...], the first half of them in the lower bits."""
    half = packed.shape[1]
    flat = codes.view(len(codes), -1)
    packed.copy_(flat[:, :half])
    packed[:, : flat.shape[1] - half] |= flat[:, half:].to(torch.uint8) << 4


def _load_nibbles(packed: Tensor, codes: Tensor) -> Tensor:
    """Write to float32 [n, codes], which is returned, what `_store_nibbles` wrote."""
    half = packed.shape[1]
    codes[:, :half].copy_(packed & 15)
    codes[:, half:].copy_((packed >> 4)[:, : codes.shape[1] - half])
    return codes


def _divisor_from(number: int, limit: int) -> int:
    """The smallest divisor that is at least `limit`, or the number itself."""
    return next(size for size in range(min(limit, number), number + 1) if number % size == 0)
