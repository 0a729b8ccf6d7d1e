"""Makes an FP8 or INT4 checkpoint of a plain one, without data.

    python -m scripts.quantize models/gemma-3-27b models/gemma-3-27b-fp8 --to fp8
    python -m scripts.quantize models/gemma-3-27b models/gemma-3-27b-int4 --to int4 --group 128

The decoder's matrices are quantised, and nothing else unless the head is asked for. What is written is in the layout of
compressed-tensors, which this project reads and others do. One layer is in memory at a time. A run that is cut short
goes on where it was: layers lie in TARGET.partial until all are there, and TARGET appears at the end, whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.models.gemma3.tensor_files import weight_files
from wicore_backend.models.gemma3.tensor_names import HEAD, canonical_name, may_be_quantized
from wicore_backend.observability.progress import ByteProgress
from wicore_backend.processor.checkpoint_files import read_json
from wicore_backend.quantization.fp8 import fp8_tensors, quantized_fp8
from wicore_backend.quantization.int4_formats import packed_tensors
from wicore_backend.quantization.int4_rounding import quantized_int4
from wicore_backend.sizes import disk_size

_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"text\.layers\.(\d+)\.")
_EMBEDDING = "text.embed_tokens.weight"
_IGNORED = ("re:.*vision_tower.*", "re:.*multi_modal_projector.*")
_STATE = "quantising.json"
"""What a run that is not finished is of; in its directory until it is."""
_TYPE_BITS = {"F32": 32, "BF16": 16, "F16": 16}
_FEW_ROWS = 16
_SPARE = 1.02
"""Room on the disk, for a byte of tensors: files have headers, and there are small ones."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes
    ----------
    tensors
        What stands in the checkpoint for a matrix [N, K], by its name after the module's.
    bits
        That a value takes, scales included.
    config
        Of compressed-tensors: the format's name and how weights and activations are kept.
    """

    name: str
    tensors: Callable[[Tensor], Mapping[str, Tensor]]
    bits: float
    format: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None

    def config(self, *, head: bool) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        group = {"targets": ["Linear"], "weights": dict(self.weights), "input_activations": self.activations}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [*([] if head else ["lm_head"]), *_IGNORED],
        }


def fp8() -> Scheme:
    """A scale for each output; activations are quantised as they come, a scale for each token."""
    of_eight: dict[str, Any] = {"type": "float", "num_bits": 8, "symmetric": True}
    return Scheme(
        name="fp8",
        tensors=lambda matrix: fp8_tensors(quantized_fp8(matrix)),
        bits=8,
        format="float-quantized",
        weights=of_eight | {"strategy": "channel", "dynamic": False},
        activations=of_eight | {"strategy": "token", "dynamic": True},
    )


def int4(group: int) -> Scheme:
    """A scale for every `group` inputs of an output; activations stay as they are."""
    weights = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": group}
    return Scheme(
        name=f"int4 by {group}",
        tensors=lambda matrix: packed_tensors(quantized_int4(matrix, group)),
        bits=4 + 16 / group,
        format="pack-quantized",
        weights=weights | {"dynamic": False},
        activations=None,
    )


class _Source:
    """A plain checkpoint's tensors, by the names in its files, and which of them are to be quantised."""

    def __init__(self, directory: Path, stack: ExitStack, *, head: bool) -> None:
        self.directory = directory
        if "quantization_config" in read_json(directory / "config.json"):
            raise CheckpointError(f"{directory} is quantised already; quantise the checkpoint that it was made of")
        self._files: dict[str, Any] = {}
        for path in weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; download the checkpoint again") from None
            self._files |= dict.fromkeys(file.keys(), file)
        self._canonical = {canonical_name(name): name for name in self._files}
        self._head = head
        self._adds_head = head and HEAD not in self._canonical

    def groups(self) -> dict[str, list[str]]:
        """Names of tensors by the file that they go to: one for each layer, one for the rest."""
        groups: dict[str, list[str]] = {}
        for canonical, name in sorted(self._canonical.items()):
            layer = _LAYER.match(canonical)
            groups.setdefault(f"layer-{int(layer[1]):03d}" if layer else "rest", []).append(name)
        if self._adds_head:
            groups["head"] = [HEAD]
        return {f"{group}.safetensors": names for group, names in groups.items()}

    def quantizes(self, name: str) -> bool:
        canonical = canonical_name(name)
        return may_be_quantized(canonical) and (self._head or canonical != HEAD)

    def read(self, name: str) -> Tensor:
        file, stored = self._place(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> list[int]:
        file, stored = self._place(name)
        shape: list[int] = file.get_slice(stored).get_shape()
        return shape

    def bits(self, name: str, *, quantized: float | None = None) -> float:
        """That a tensor takes: as it is, or with `quantized` a value."""
        file, stored = self._place(name)
        if (kind := file.get_slice(stored).get_dtype()) not in _TYPE_BITS:
            raise CheckpointError(
                f"{name} is {kind} in place of {' or '.join(_TYPE_BITS)}; quantise a plain checkpoint"
            )
        return math.prod(self.shape(name)) * (quantized or _TYPE_BITS[kind])

    def _place(self, name: str) -> tuple[Any, str]:
        """The file that holds what becomes the tensor `name`, and its name there."""
        stored = self._canonical[_EMBEDDING] if self._adds_head and name == HEAD else name
        return self._files[stored], stored


def quantize(source: Path, target: Path, scheme: Scheme, *, device: torch.device, head: bool = False) -> int:
    """Write the checkpoint `source`, quantised by `scheme`, to `target`; returns the bytes of its weights.

    Parameters
    ----------
    device
        That rounds.
    head
        Quantise the head too; one that is the embedding becomes a matrix of its own.

    Raises
    ------
    CheckpointError
        If `source` is no plain checkpoint, `target` exists, the disk has no room, or a matrix does not fit the scheme.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; name a directory that does not, or remove it")
    partial = target.with_name(f"{target.name}.partial")
    with ExitStack() as stack:
        checkpoint = _Source(source, stack, head=head)
        _check_fits(checkpoint, scheme)
        _begin(partial, checkpoint, scheme, head=head)
        groups = checkpoint.groups()
        sizes = {file: round(sum(map(checkpoint.bits, names)) / 8) for file, names in groups.items()}
        _check_room(partial, checkpoint, groups, scheme)
        weight_map: dict[str, str] = {}
        done = 0
        progress = stack.enter_context(ByteProgress(f"quantising to {scheme.name}", _log))
        for file, names in groups.items():
            if not (partial / file).exists():
                _write_group(partial / file, checkpoint, names, scheme, device)
            with safe_open(partial / file, framework="pt") as written:
                weight_map |= dict.fromkeys(written.keys(), file)
            done += sizes[file]
            progress(done, sum(sizes.values()))
    total = sum((partial / file).stat().st_size for file in groups)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / _INDEX).write_text(json.dumps(index, indent=2))
    _copy_rest(source, partial)
    config = read_json(source / "config.json") | {"quantization_config": scheme.config(head=head)}
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    partial.rename(target)
    (target / _STATE).unlink()  # Not before: whoever is cut short here has a target that is whole.
    return total


def _begin(partial: Path, checkpoint: _Source, scheme: Scheme, *, head: bool) -> None:
    """An empty directory, or the one that the same run left."""
    origin = blake2b(checkpoint_fingerprint(checkpoint.directory), digest_size=16).hexdigest()
    state = {"source": origin, "scheme": scheme.name, "head": head}
    if (partial / _STATE).exists() and read_json(partial / _STATE) == state:
        _log.info("going on with %s", partial)
        return
    if partial.exists():
        raise CheckpointError(f"{partial} is of another checkpoint or another way to quantise; remove it")
    partial.mkdir(parents=True)
    (partial / _STATE).write_text(json.dumps(state))


def _check_fits(checkpoint: _Source, scheme: Scheme) -> None:
    """Before anything is written: whether all matrices can be cut as the scheme asks, which depends on their inputs."""
    tried: set[int] = set()
    for name in (name for names in checkpoint.groups().values() for name in names if checkpoint.quantizes(name)):
        inputs = checkpoint.shape(name)[1]
        if inputs in tried:
            continue
        tried.add(inputs)
        try:
            scheme.tensors(torch.zeros(_FEW_ROWS, inputs, dtype=torch.bfloat16))
        except ValueError as error:
            raise CheckpointError(
                f"{name} {checkpoint.shape(name)} cannot be {scheme.name}: {error}; --group sets it"
            ) from None


def _check_room(partial: Path, checkpoint: _Source, groups: Mapping[str, list[str]], scheme: Scheme) -> None:
    bits = sum(
        checkpoint.bits(name, quantized=scheme.bits if checkpoint.quantizes(name) else None)
        for file, names in groups.items()
        if not (partial / file).exists()
        for name in names
    )
    needed = bits / 8 * _SPARE
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CheckpointError(f"{partial} needs {disk_size(needed)}, and its disk has {disk_size(free)} free")


def _write_group(path: Path, checkpoint: _Source, names: list[str], scheme: Scheme, device: torch.device) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = checkpoint.read(name)
        if not checkpoint.quantizes(name):
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite; download the checkpoint again")
        parts = scheme.tensors(tensor.to(device))
        tensors |= {f"{module}.{part}": value.cpu().contiguous() for part, value in parts.items()}
    unfinished = path.with_suffix(".tmp")
    unfinished.touch()  # With the rights that new files have here: safetensors would let nobody else read it.
    rights = unfinished.stat().st_mode
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(rights)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, processor and templates: all files but weights, their index and config.json."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in ("config.json", _INDEX):
            shutil.copy2(file, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint in float32, bfloat16 or float16")
    parser.add_argument("target", type=Path, help="directory to be made")
    parser.add_argument("--to", choices=["fp8", "int4"], required=True)
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale in INT4")
    parser.add_argument("--head", action="store_true", help="quantise the head too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that rounds")
    args = parser.parse_args()
    if args.group <= 0 or args.group % 8:
        parser.error(f"--group {args.group}: a positive multiple of 8 is needed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    scheme = fp8() if args.to == "fp8" else int4(args.group)
    try:
        total = quantize(args.source, args.target, scheme, device=torch.device(args.device), head=args.head)
    except CheckpointError as error:
        raise SystemExit(f"quantize: {error}") from None
    print(f"{args.target}: {disk_size(total)} of weights, {scheme.name}")


if __name__ == "__main__":
    main()
