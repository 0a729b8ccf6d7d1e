"""What tells two checkpoints apart, without reading all of them."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

_SAMPLE_BYTES = 4096
_SAMPLES = 4096
"""Of each file of weights: 16 MiB, evenly spread, so that a tensor of half a megabyte in a file of 2 GB is in it."""


def checkpoint_fingerprint(directory: Path) -> bytes:
    """32 bytes that tell checkpoints apart whose keys and values differ.

    It covers the configuration, and of the weights their names, shapes, lengths, and samples all over them: training
    changes tensors everywhere, so another fine-tune of the same model has another fingerprint. A single number that is
    changed by hand in a large file may escape it.

    Raises
    ------
    OSError
        If a file cannot be read.
    """
    digest = blake2b(digest_size=32)
    digest.update((directory / "config.json").read_bytes())
    preprocessor = directory / "preprocessor_config.json"
    digest.update(preprocessor.read_bytes() if preprocessor.exists() else b"")  # What pixels become before the tower.
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = file.seek(0, 2)
            file.seek(0)
            header = file.read(8)
            names = file.read(int.from_bytes(header, "little"))
            digest.update(f"{path.name} {length} {len(names)} ".encode() + names)
            start = 8 + len(names)
            step = max(_SAMPLE_BYTES, (length - start) // _SAMPLES)
            for offset in range(start, length, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
