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
  use correctly rounded operations only; in q4 a fused multiply-add may make the odd value fall on the other side.
- fp8 and q8: what was decoded decodes to the same after a second time, so that a block that comes and goes does not
  fade. Not so the keys of q4, whose ranges may tighten; each time adds an error within the same bound.

All computing is in float32, a few MiB at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from wicore_backend.errors import InvalidArgumentError

CodecName = Literal["exact", "fp8", "q8", "q4"]
BlockShape = tuple[int, int, int, int, int]
"""[layers of the group, 2 (K, V), block_size, KV heads, head dim]"""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK_VALUES = 2**19
"""Worked on at once: 2 MiB in float32. With q8 at 2**17, calling operators takes a third of the time."""


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


class Codec(ABC):
    """Encodes blocks of one shape and dtype, on the device where they are.

    Attributes
    ----------
    encoded_bytes
        Size of every encoded block.
    """

    name: ClassVar[CodecName]
    version: ClassVar[int] = 1
    """Grows with every change of what is written."""

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        if len(shape) != 5 or min(shape) < 1 or shape[1] != 2:
            raise InvalidArgumentError(
                f"a block of shape {tuple(shape)} is not [layers, 2 (K, V), block_size, KV heads, head dim]"
            )
        if dtype not in _DTYPES:
            raise InvalidArgumentError(f"blocks of {dtype} cannot be encoded, only those of {_DTYPES}")
        self.shape = shape
        self.dtype = dtype
        self.encoded_bytes = shape[0] * self._layer_bytes()

    @property
    def fingerprint(self) -> bytes:
        """Differs between codecs whose bytes mean different things."""
        return f"{self.name}/{self.version} {tuple(self.shape)} {self.dtype}".encode()

    @property
    def ratio(self) -> float:
        """How many times smaller a block gets."""
        return prod(self.shape) * self.dtype.itemsize / self.encoded_bytes

    def encode(self, blocks: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Encode blocks [N, *shape].

        Returns
        -------
        uint8 [N, encoded_bytes], which is `out` if that is given.

        Raises
        ------
        InvalidArgumentError
            If a tensor is not contiguous, or of another shape, dtype or device.
        """
        self._check("blocks", blocks, self.shape, self.dtype, blocks)
        if out is None:
            out = torch.empty(len(blocks), self.encoded_bytes, dtype=torch.uint8, device=blocks.device)
        self._check("out", out, (self.encoded_bytes,), torch.uint8, blocks)
        with torch.inference_mode():
            for layers, records, scratch in self._chunks(blocks, out):
                self._pack(layers, records, scratch)
        return out

    def decode(self, encoded: Tensor, *, out: Tensor) -> None:
        """Decode uint8 [N, encoded_bytes] into `out` [N, *shape], which may be consecutive blocks of a pool.

        The bytes must be whole: any bytes decode to something.

        Raises
        ------
        InvalidArgumentError
            If a tensor is not contiguous, or of another shape, dtype or device.
        """
        self._check("encoded", encoded, (self.encoded_bytes,), torch.uint8, out)
        self._check("out", out, self.shape, self.dtype, encoded)
        with torch.inference_mode():
            for layers, records, scratch in self._chunks(out, encoded):
                self._unpack(records, layers, scratch)

    def _chunks(self, blocks: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layers [n, 2, block_size, heads, d], their records [n, bytes of one] and scratch float32 [2, like layers].

        One scratch for all: memory that is allocated for each chunk, the system takes back and gives anew, page by
        page, which takes longer than the work on it.
        """
        count = len(blocks) * self.shape[0]
        size = min(count, max(1, _CHUNK_VALUES // prod(self.shape[1:])))
        scratch = torch.empty(2, size, *self.shape[1:], dtype=torch.float32, device=blocks.device)
        layers, records = blocks.view(count, *self.shape[1:]), encoded.view(count, self._layer_bytes())
        for start in range(0, count, size or 1):
            part = slice(start, start + size)
            yield layers[part], records[part], scratch[:, : min(size, count - start)]

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, peer: Tensor) -> None:
        wanted = (len(peer), *shape)
        if tensor.shape != wanted or tensor.dtype != dtype or tensor.device != peer.device:
            raise InvalidArgumentError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"{self.name} takes {dtype} {list(wanted)} on {peer.device}"
            )
        if not tensor.is_contiguous():
            raise InvalidArgumentError(f"{name} has strides {tensor.stride()}; pass it contiguous")

    @abstractmethod
    def _layer_bytes(self) -> int:
        """Bytes of one layer of a block, keys and values."""

    @abstractmethod
    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        """Write `layers` to `records`."""

    @abstractmethod
    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        """Write what `records` hold to `layers`."""


class ExactCodec(Codec):
    """The bytes themselves."""

    name = "exact"

    def _layer_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def _pack(self, layers: Tensor, records: Tensor, _scratch: Tensor) -> None:
        records.copy_(layers.view(len(layers), -1).view(torch.uint8))

    def _unpack(self, records: Tensor, layers: Tensor, _scratch: Tensor) -> None:
        layers.view(len(layers), -1).view(torch.uint8).copy_(records)


class _ScaledCodec(Codec):
    """A byte a value, in units of the largest magnitude of its group; that is stored in the dtype, so it is exact.

    A record is the bytes of all values and then the groups' magnitudes.
    """

    grouped: ClassVar[tuple[int, ...]]
    """Axes of `_groups()` that a group extends over."""

    @abstractmethod
    def _groups(self) -> tuple[int, ...]:
        """The shape of a layer's groups."""

    @abstractmethod
    def _store(self, units: Tensor, codes: Tensor) -> None:
        """Write float32 [n, values], from -1 to 1, as uint8. May use `units` as scratch."""

    @abstractmethod
    def _load(self, codes: Tensor, units: Tensor) -> None:
        """Write the units float32 [n, values] that codes stand for: 1 is exactly 1."""

    def _scales_shape(self) -> tuple[int, ...]:
        return tuple(1 if axis in self.grouped else size for axis, size in enumerate(self._groups(), 1))

    def _layer_bytes(self) -> int:
        return prod(self.shape[1:]) + prod(self._scales_shape()) * self.dtype.itemsize

    def _pack(self, layers: Tensor, records: Tensor, scratch: Tensor) -> None:
        values, units = (part.view(-1, *self._groups()) for part in scratch)
        _copy_finite(layers, scratch[0])
        torch.abs(values, out=units)
        scales = units.amax(self.grouped, keepdim=True)
        torch.div(values, scales.clamp(min=_LEAST), out=units)
        codes, stored = records.split_with_sizes(self._sections(), 1)
        self._store(units.view(len(layers), -1), codes)
        stored.copy_(_bytes(scales.to(self.dtype)))

    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        codes, stored = records.split_with_sizes(self._sections(), 1)
        scales = _numbers(stored, self.dtype).view(-1, *self._scales_shape())
        units = scratch[0].view(len(layers), -1)
        self._load(codes, units)
        units.view(-1, *self._groups()).mul_(scales)
        layers.copy_(scratch[0])

    def _sections(self) -> list[int]:
        values = prod(self.shape[1:])
        return [values, self._layer_bytes() - values]


class Fp8Codec(_ScaledCodec):
    """e4m3. Error of a value x in a head whose largest magnitude is m: at most |x| / 16, or m / 458,752 if that is
    more, and half a unit in the dtype's last place."""

    name = "fp8"
    grouped = (2, 4)  # Tokens and channels of [2, block_size, heads, d].

    def _groups(self) -> tuple[int, ...]:
        return self.shape[1:]

    def _store(self, units: Tensor, codes: Tensor) -> None:
        codes.copy_(units.mul_(_FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8))

    def _load(self, codes: Tensor, units: Tensor) -> None:
        units.copy_(codes.view(torch.float8_e4m3fn)).div_(_FP8_MAX)


class Q8Codec(_ScaledCodec):
    """Error of a value in a group whose largest magnitude is m: at most m / 254 and half a unit in the dtype's last
    place."""

    name = "q8"
    grouped = (2,)

    def _groups(self) -> tuple[int, ...]:
        size = _divisor_up_to(prod(self.shape[1:]), _Q8_GROUP)
        return (prod(self.shape[1:]) // size, size)

    def _store(self, units: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(units.mul_(127).round_())

    def _load(self, codes: Tensor, units: Tensor) -> None:
        units.copy_(codes.view(torch.int8)).div_(127)


class Q4Codec(Codec):
    """Error of a value: at most a 30th of its range, and half a unit in the dtype's last place. The range of a value is
    that of its group; that of a key is its channel's, rounded outwards to 15ths of the head's.

    A layer's record is, in this order: the codes of keys, two a byte, the keys' channel ranges, a byte each, the
    keys' head ranges, the codes of values, two a byte, and the values' ranges. Magnitudes over 2**126 count as 2**126.
    """

    name = "q4"

    def __init__(self, shape: BlockShape, dtype: torch.dtype) -> None:
        _, _, tokens, heads, dim = shape
        run = _divisor_from(tokens, _Q4_KEY_TOKENS)
        self._keys = (tokens // run, run, heads, dim)
        width = _divisor_up_to(dim, _Q4_VALUE_GROUP)
        rows = _divisor_from(tokens, -(-_Q4_VALUE_GROUP // width))
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
        _copy_finite(layers, finite).clamp_(-_Q4_MAX, _Q4_MAX)

        keys = finite[:, 0].view(-1, *self._keys)  # [n, runs, tokens, heads, d]
        low, high = keys.amin(2, keepdim=True), keys.amax(2, keepdim=True)
        least, most = low.amin(4, keepdim=True), high.amax(4, keepdim=True)
        first = _position(low, least, most).mul_(15).floor_()
        last = _position(high, least, most).mul_(15).ceil_()
        low, high = torch.lerp(least, most, first / 15), torch.lerp(least, most, last / 15)
        places = _position(keys, low, high, out=work[0].view_as(keys))
        _store_nibbles(places.mul_(15).round_(), key_codes)
        channels.copy_(first.add_(last, alpha=16).flatten(1))
        heads.copy_(_bytes(torch.stack((least, most), 1).to(self.dtype)))

        values = finite[:, 1].view(-1, *self._values)  # [n, groups, tokens, heads, parts, width]
        least, most = values.amin((2, 5), keepdim=True), values.amax((2, 5), keepdim=True)
        places = _position(values, least, most, out=work[1].view_as(values))
        _store_nibbles(places.mul_(15).round_(), value_codes)
        ranges.copy_(_bytes(torch.stack((least, most), 1).to(self.dtype)))

    def _unpack(self, records: Tensor, layers: Tensor, scratch: Tensor) -> None:
        key_codes, channels, heads, value_codes, ranges = records.split_with_sizes(self._sections(), 1)
        work = scratch[0].view(2, len(layers), -1)
        runs, _, count, dim = self._keys
        least, most = _numbers(heads, self.dtype).view(-1, 2, runs, 1, count, 1).unbind(1)
        ends = channels.view(-1, runs, 1, count, dim)
        low = torch.lerp(least, most, (ends & 15).to(torch.float32).div_(15))
        high = torch.lerp(least, most, (ends >> 4).to(torch.float32).div_(15))
        places = work[0].view(-1, *self._keys)
        _load_nibbles(key_codes, work[0]).div_(15)
        layers[:, 0].view(-1, *self._keys).copy_(torch.lerp(low, high, places, out=places))

        groups, _, count, parts, _ = self._values
        least, most = _numbers(ranges, self.dtype).view(-1, 2, groups, 1, count, parts, 1).unbind(1)
        places = work[1].view(-1, *self._values)
        _load_nibbles(value_codes, work[1]).div_(15)
        layers[:, 1].view(-1, *self._values).copy_(torch.lerp(least, most, places, out=places))


_LEAST = 2.0**-149
"""The smallest float32 above 0: what 0 is divided by instead of 0."""
_FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
_Q8_GROUP = 64
"""A 16-bit scale for 64 values makes 1.94 times smaller; for 32, 1.88."""
_Q4_KEY_TOKENS = 16
_Q4_VALUE_GROUP = 128
_Q4_MAX = 2.0**126
"""The difference of two such numbers is finite in float32."""

_CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (ExactCodec, Fp8Codec, Q8Codec, Q4Codec)}


def _copy_finite(layers: Tensor, values: Tensor) -> Tensor:
    """Write `layers` as finite float32 to `values`, which is returned."""
    largest = torch.finfo(layers.dtype).max
    return values.copy_(layers).nan_to_num_(0.0, posinf=largest, neginf=-largest)


def _position(values: Tensor, low: Tensor, high: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Where from `low` (0) to `high` (1) values are, or at the nearer end; 0 in a range that is a point."""
    width = high - low
    return torch.sub(values, low, out=out).div_(width.clamp_(min=_LEAST)).clamp_(0, 1)


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


def _bytes(numbers: Tensor) -> Tensor:
    """uint8 [n, ...] of numbers [n, ...]."""
    return numbers.reshape(len(numbers), -1).view(torch.uint8)


def _numbers(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 of numbers stored by `_bytes`, wherever in memory they lie."""
    return stored.clone(memory_format=torch.contiguous_format).view(dtype).to(torch.float32)


def _divisor_up_to(number: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if number % size == 0)


def _divisor_from(number: int, limit: int) -> int:
    """The smallest divisor that is at least `limit`, or the number itself."""
    return next(size for size in range(min(limit, number), number + 1) if number % size == 0)
