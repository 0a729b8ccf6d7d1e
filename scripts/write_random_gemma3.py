"""Writes a checkpoint of a published Gemma-3 shape with random weights, in bf16 and Hugging Face's layout.

    python -m scripts.write_random_gemma3 gemma-3-27b build/random-27b

For measurements of loading and serving where no checkpoint is at hand. One file a layer, several written at once;
gemma-3-27b takes 54 GB.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.random_gemma3 import SHAPES, write_directory
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.tensor_names import HEAD, Shape, expected_shapes

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
_WRITERS = 4
_LAYER = re.compile(r"text\.layers\.(\d+)\.")


def write_checkpoint(shape: str, directory: Path, *, device: torch.device) -> int:
    """Write it, head and embedding one; returns its bytes."""
    write_directory(shape, directory, like=DEMO_MODEL)
    files: dict[str, dict[str, Shape]] = {}
    for name, size in expected_shapes(Gemma3Config.from_checkpoint(directory)).items():
        if name != HEAD:
            layer = _LAYER.match(name)
            file = f"layer-{int(layer[1]):03d}.safetensors" if layer else "rest.safetensors"
            files.setdefault(file, {})["model." + name.removeprefix("text.")] = size
    with ThreadPoolExecutor(_WRITERS) as writers:
        sizes = writers.map(lambda file: _write(directory / file, files[file], device), files)
        total = sum(sizes)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def _write(path: Path, shapes: dict[str, Shape], device: torch.device) -> int:
    tensors = {name: _random(shape, device).cpu() for name, shape in shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _random(shape: Shape, device: torch.device) -> Tensor:
    """A matrix that keeps activations as large as they come, or a norm's weight, to which Gemma adds one."""
    std = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = write_checkpoint(given.shape, given.directory, device=device)
    print(f"{size / 1e9:.1f} GB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
