"""Blocks as records of an NVMe store: their names, their sizes, and the store that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wicore_backend.hmt.codecs import Codec
from wicore_backend.hmt.host_tier import Key
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.names import NAME_BYTES
from wicore_backend.hmt.nvme import NvmeConfig
from wicore_backend.hmt.nvme.files import PAGE
from wicore_backend.hmt.nvme.record import HEADER_BYTES, slots_for

_TAGS = {group: group.value.encode().ljust(NAME_BYTES, b"\0") for group in LayerGroup}
_GROUPS = {tag: group for group, tag in _TAGS.items()}
_MOST_PIECES = 64


def record_name(key: Key) -> bytes:
    """32 bytes: the block's name and its group."""
    group, name = key
    if len(name) != NAME_BYTES:
        raise ValueError(f"a block's name of {len(name)} bytes; it has to have {NAME_BYTES}")
    return name + _TAGS[group]


def key_of(name: bytes) -> Key | None:
    """The block that a record's name stands for; None for a record of somebody else."""
    group = _GROUPS.get(name[NAME_BYTES:])
    return None if group is None else (group, name[:NAME_BYTES])


def store_config(
    directory: Path,
    *,
    capacity_bytes: int,
    codecs: Mapping[LayerGroup, Codec],
    fingerprint: bytes,
    read_deadline_s: float = 1.0,
    write_deadline_s: float = 5.0,
    preallocate: bool = True,
) -> NvmeConfig:
    """A store for blocks that these codecs encode, with slots that waste as little as whole pages allow.

    Parameters
    ----------
    fingerprint
        Of everything but the codecs that changes what a block's bytes mean: weights, dtype, layout, RoPE.
    """
    sizes = [codec.encoded_bytes for codec in codecs.values()]
    candidates = {-(-size // (pieces * PAGE)) * PAGE for size in sizes for pieces in range(1, _MOST_PIECES + 1)}

    def waste(slot_bytes: int) -> float:
        return max(slots_for(size, slot_bytes) * (slot_bytes + HEADER_BYTES) / size for size in sizes)

    return NvmeConfig(
        directory=directory,
        capacity_bytes=capacity_bytes,
        slot_bytes=min(sorted(candidates, reverse=True), key=waste),
        max_payload_bytes=max(sizes),
        fingerprint=b"\n".join([fingerprint, *(b"%s %s" % (_TAGS[g], codecs[g].fingerprint) for g in sorted(codecs))]),
        read_deadline_s=read_deadline_s,
        write_deadline_s=write_deadline_s,
        preallocate=preallocate,
    )
