"""Names of KV blocks: a hash chain over everything that a block's keys and values depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack
from typing import Protocol

NAME_BYTES = 16

_HASHER = blake2b(digest_size=NAME_BYTES)
"""Copied for each name, which takes half as long as a new one."""


class SeenImage(Protocol):
    """An image in a prompt, as far as names depend on it."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class NameScheme:
    """What the names of all blocks of one engine have in common.

    Attributes
    ----------
    fingerprint
        Of everything else that changes a block's bytes: weights, dtype, layout.
    """

    block_size: int
    fingerprint: bytes = b""

    def root(self, salt: str) -> bytes:
        """Where the chains of one tenant begin. Tenants with different salts share no block."""
        return _hash(self.fingerprint, salt.encode())


class BlockNames:
    """The names of one sequence's full blocks, worked out as they are asked for.

    A name covers the block's tokens, the images that it shows and, by the name before it, everything in front of it.

    Parameters
    ----------
    tokens
        The sequence's own list, which may grow.
    images
        Those of its prompt, in order.
    salt
        See NameScheme.root.
    """

    def __init__(self, scheme: NameScheme, tokens: list[int], images: Sequence[SeenImage], salt: str) -> None:
        self._size = scheme.block_size
        self._tokens = tokens
        self._images = images
        self._root = scheme.root(salt)
        self._names: list[bytes] = []

    def first(self, count: int) -> Sequence[bytes]:
        """The names of at least the first `count` blocks, whose tokens must all be there."""
        size, names = self._size, self._names
        if (known := len(names)) < count:
            packed = _packed(self._tokens[known * size : count * size])  # One by one takes a third longer.
            previous, step = names[-1] if names else self._root, len(packed) // (count - known)
            for offset, start in zip(range(0, len(packed), step), range(known * size, count * size, size), strict=True):
                previous = self._name(previous, packed[offset : offset + step], start, start + size)
                names.append(previous)
        return names

    def resumable(self, count: int) -> int:
        """The most blocks, of at most `count`, that end inside no image: an image is computed at once."""
        for image in reversed(self._images):
            if image.start < count * self._size < image.end:
                count = image.start // self._size
        return count

    def whole(self, length: int) -> bytes:
        """A name of the first `length` tokens, whether or not a block ends there."""
        full = length // self._size
        previous = self.first(full)[full - 1] if full else self._root
        start = full * self._size
        return _hash(self._name(previous, _packed(self._tokens[start:length]), start, length), b"end")

    def _name(self, previous: bytes, content: bytes, start: int, end: int) -> bytes:
        """The name of the block after `previous`, which holds tokens `start` to `end` - 1: `content`."""
        hashed = _HASHER.copy()
        hashed.update(previous + content)
        for image in self._images:
            if image.start < end and start < image.end:
                hashed.update(_with_length(image.digest) + pack("2i", image.start - start, image.end - start))
        return hashed.digest()


def _packed(tokens: Sequence[int]) -> bytes:
    return pack(f"{len(tokens)}i", *tokens)


def _hash(*parts: bytes) -> bytes:
    return blake2b(b"".join(map(_with_length, parts)), digest_size=NAME_BYTES).digest()


def _with_length(part: bytes) -> bytes:
    """So that two parts are never read as two others."""
    return len(part).to_bytes(4, "little") + part
