"""Writes a checkpoint of a published Gemma-3 shape with random weights, in Hugging Face's layout.

    python -m scripts.write_random_gemma3 gemma-3-27b build/random-27b
    python -m scripts.write_random_gemma3 gemma-3-27b build/random-27b-int4 --int4 --vision

For measurements of loading, building and serving where no checkpoint is at hand. One file a layer, several written at
once; gemma-3-27b takes 54 GB in bf16, and 17 GB with its layers' matrices in INT4 as compressed-tensors has them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.quantize import int4
from scripts.random_gemma3 import SHAPES, write_directory
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.tensor_names import HEAD, Shape, expected_shapes, may_be_quantized

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
_WRITERS = 4
_LAYER = re.compile(r"text\.layers\.(\d+)\.")
_TEXT_ONLY = {"text.": "model."}
_WITH_VISION = {
    "text.": "language_model.model.",
    "vision.": "vision_tower.vision_model.",
    "projector.": "multi_modal_projector.",
}
_GROUP = 128
_CODE_STD = 4.6
"""Of codes from -8 to 7, each as likely as any other."""


def write_checkpoint(
    shape: str, directory: Path, *, device: torch.device, quantized: bool = False, vision: bool = False
) -> int:
    """Write it, head and embedding one, its layers' matrices in INT4 if `quantized`; returns its bytes."""
    more = {"quantization_config": int4(_GROUP).config(head=False)} if quantized else {}
    write_directory(shape, directory, like=DEMO_MODEL, vision=vision, **more)
    files: dict[str, dict[str, Shape]] = {}
    for name, size in expected_shapes(Gemma3Config.from_checkpoint(directory)).items():
        if name != HEAD:
            layer = _LAYER.match(name)
            files.setdefault(f"layer-{int(layer[1]):03d}.safetensors" if layer else "rest.safetensors", {})[name] = size
    prefixes = _WITH_VISION if vision else _TEXT_ONLY
    with ThreadPoolExecutor(_WRITERS) as writers:
        written = list(
            writers.map(lambda file: _write(directory / file, files[file], prefixes, device, quantized), files)
        )
    weight_map = {name: file for file, sizes in zip(files, written, strict=True) for name in sizes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(size for sizes in written for size in sizes.values())


def _write(
    path: Path, shapes: Mapping[str, Shape], prefixes: Mapping[str, str], device: torch.device, quantized: bool
) -> Mapping[str, int]:
    """Bytes by the names of what was written."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        stored = prefixes[prefix] + name.removeprefix(prefix)
        if quantized and may_be_quantized(name):
            module = stored.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor.cpu() for part, tensor in _random_int4(shape, device).items()}
        else:
            tensors[stored] = _random(shape, device).cpu()
    save_file(tensors, path, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _random(shape: Shape, device: torch.device) -> Tensor:
    """A matrix that keeps activations as large as they come, or a norm's weight, to which Gemma adds one."""
    std = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, std)


def _random_int4(shape: Shape, device: torch.device) -> Mapping[str, Tensor]:
    """A matrix of the same size in four bits, as "pack-quantized" stores it."""
    rows, columns = shape
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, device=device)
    scales = torch.empty(rows, columns // _GROUP, dtype=torch.bfloat16, device=device)
    scales.uniform_(0.5, 1.5).mul_(columns**-0.5 / _CODE_STD)
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor(shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--int4", action="store_true", help="the layers' matrices in four bits")
    parser.add_argument("--vision", action="store_true", help="with the published models' vision tower")
    given = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = write_checkpoint(given.shape, given.directory, device=device, quantized=given.int4, vision=given.vision)
    print(f"{size / 1e9:.1f} GB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
