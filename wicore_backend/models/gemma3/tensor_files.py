"""The open safetensors files of a checkpoint, which tensors they hold, and how those are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.tensor_names import Shape, canonical_name
from wicore_backend.models.gemma3.upload import StoredTensor, Uploader, stored_tensors
from wicore_backend.processor.checkpoint_files import read_json
from wicore_backend.quantization.base import Stored

REMEDY = "download the checkpoint again, or point the model setting at a complete one"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TensorFiles:
    """The tensors of a checkpoint's open files, under canonical names, on their way to `device`."""

    def __init__(
        self, directory: Path, stack: ExitStack, device: torch.device, progress: Callable[[int, int], object]
    ) -> None:
        self._directory = directory
        self._device = device
        self._sources: dict[str, tuple[Any, str]] = {}
        self._places: dict[str, StoredTensor] = {}
        self._done = 0
        self._progress = progress
        self._uploader = stack.enter_context(Uploader(device, progress=self._read_on))
        for path in weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                keys = list(file.keys())
                places = stored_tensors(path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; {REMEDY}") from None
            for key in keys:
                canonical = canonical_name(key)
                if canonical in self._sources:
                    raise CheckpointError(
                        f"{directory} holds {key} twice, in {path.name} and under another name or file"
                    )
                self._sources[canonical] = (file, key)
                if key in places:
                    self._places[canonical] = places[key]
        self._total = sum(place.nbytes for place in self._places.values())

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def hold_module(self, module: str) -> bool:
        """Whether any tensor is one of this module's."""
        return any(name.startswith(f"{module}.") for name in self._sources)

    def check(self, expected: Mapping[str, Stored]) -> None:
        """CheckpointError unless the tensors' names, shapes and types are exactly those `expected`."""
        required = {name for name, stored in expected.items() if not stored.optional}
        self._refuse("lacks", required - self._sources.keys(), REMEDY)
        extra = [self._sources[name][1] for name in self._sources.keys() - expected.keys()]
        self._refuse("holds beside what config.json calls for", extra, "does config.json belong to these weights?")
        shapes, types = [], []
        for name in expected.keys() & self._sources.keys():
            key, allowed = self._sources[name][1], expected[name]
            if self.shape(name) not in allowed.shapes:
                wanted = " or ".join(str(list(shape)) for shape in allowed.shapes)
                shapes.append(f"{key} {list(self.shape(name))} in place of {wanted}")
            if self.type(name) not in allowed.types:
                types.append(f"{key} {self.type(name)} in place of {' or '.join(allowed.types)}")
        self._refuse("holds in other shapes than config.json says", shapes, "does config.json belong to these weights?")
        self._refuse(
            "holds in an unknown type",
            types,
            "a quantised checkpoint needs the quantization_config in config.json that it was published with",
        )

    def shape(self, name: str) -> Shape:
        file, key = self._sources[name]
        return tuple(file.get_slice(key).get_shape())

    def type(self, name: str) -> str:
        """By safetensors' name for it."""
        file, key = self._sources[name]
        return str(file.get_slice(key).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype, device=self._device)
        self._uploader.copy(place, tensor)
        return tensor

    def fill(self, into: Tensor, name: str) -> None:
        """Read the tensor into one of its shape, and in the type of that."""
        self._uploader.copy(self._places[name], into)

    def _read_on(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._total)

    def _refuse(self, what: str, names: Iterable[str], remedy: str) -> None:
        if names := sorted(names):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"{self._directory} {what}: {shown}; {remedy}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `directory`; CheckpointError if any is missing."""
    if not (directory / _INDEX).exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}; {REMEDY}")
        return [directory / _SINGLE]
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / _INDEX} has no weight_map; {REMEDY}")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{directory / _INDEX} names {outside[0]!r}; shards lie beside the index")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        shown = ", ".join(missing[:5])
        raise CheckpointError(f"{directory} lacks {len(missing)} of the shards its index names: {shown}; {REMEDY}")
    return [directory / name for name in names]
