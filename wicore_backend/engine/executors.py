"""Which executor computes a model's dense segments, and why: decided once, before anything is loaded."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, assert_never

import torch

from wicore_backend.config import EngineConfig, ExecutorSetting
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision, segments
from wicore_backend.executor.tensorrt.library import installed_libraries, load_library
from wicore_backend.executor.tensorrt.store import MANIFEST, EngineSet, EngineStore, Wanted
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint

_log = logging.getLogger(__name__)

_BY_TYPE = {torch.float32: Precision.FP32, torch.bfloat16: Precision.BF16, torch.float16: Precision.FP16}
_NAMED_DIGITS = 16


class ExecutorName(StrEnum):
    """What there is."""

    TORCH = "torch"
    TENSORRT = "tensorrt"
    ONNX = "onnx"


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """An executor.

    Attributes
    ----------
    reason
        Why this one, in words for whoever runs the server.
    engines
        What the TensorRT executor runs; None for the others.
    """

    name: ExecutorName
    reason: str
    engines: EngineSet | None = None


class FoundEngines(NamedTuple):
    """TensorRT engines that fit, and what was passed over on the way to them, in words."""

    engines: EngineSet
    passed_over: tuple[str, ...] = ()


def choose(
    wanted: ExecutorSetting,
    device: torch.device,
    *,
    find: Callable[[], FoundEngines],
    installed: Callable[[str], object] = find_spec,
) -> Choice:
    """The executor that the setting stands for on `device`.

    Parameters
    ----------
    find
        The engines for this model and this card; raises ExecutorError, saying why, where there are none.
    installed
        Whether there is such a Python package.

    Raises
    ------
    ExecutorError
        If there is not what is asked for: says what is missing and what helps.
    """
    asked = f"executor = {wanted!r}"
    match wanted:
        case "torch":
            return Choice(ExecutorName.TORCH, asked)
        case "onnx":
            for package, name in (("onnxruntime", "ONNX Runtime"), ("onnx", "onnx, which writes graphs,")):
                if not installed(package):
                    raise ExecutorError(f"{asked}: {name} is not installed; pip install 'wicore[onnx]'")
            return Choice(ExecutorName.ONNX, asked)
        case "tensorrt":
            if device.type != "cuda":
                raise ExecutorError(
                    f"{asked} needs a CUDA device, and device is {device}; set executor to 'auto', 'torch' or 'onnx'"
                )
            try:
                found = find()
            except ExecutorError as error:
                raise ExecutorError(f"{asked}: {error}") from None
            return Choice(ExecutorName.TENSORRT, f"{asked}, {_described(found)}", found.engines)
        case "auto":
            if device.type != "cuda":
                return Choice(ExecutorName.TORCH, f"{asked} takes it on a CPU")
            try:
                found = find()
            except ExecutorError as error:
                return Choice(ExecutorName.TORCH, f"{asked}, and {error}")
            return Choice(ExecutorName.TENSORRT, f"{asked}, and there are {_described(found)}", found.engines)
    assert_never(wanted)


def _described(found: FoundEngines) -> str:
    key = found.engines.key
    engines = (
        f"engines in {key.precision} for {key.compute_capability} by {key.library} {key.version}: "
        f"{found.engines.directory}"
    )
    return "; ".join([engines, *found.passed_over])


def engines_directory(settings: EngineConfig, *, fingerprint: str | None = None) -> Path:
    """Where this model's exported graphs and engines are.

    Parameters
    ----------
    fingerprint
        The checkpoint's, in hexadecimal, if it is known: to find it takes a second for a large one.

    Raises
    ------
    OSError
        If the checkpoint cannot be read, after which the directory is named where the setting names none.
    ExecutorError
        If the user has no cache.
    """
    if settings.engines is not None:
        return settings.engines
    cache, digits = _cache(), fingerprint or checkpoint_fingerprint(settings.model).hex()
    return cache / f"{_name_of_model(settings)}-{digits[:_NAMED_DIGITS]}"


def _cache() -> Path:
    """Where directories of graphs and engines are that no setting names."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise ExecutorError(
            "this process's user has no home directory, which would have the model's graphs and engines; set engines "
            "to a directory for them"
        ) from None
    return cache / "wicore"


def _name_of_model(settings: EngineConfig) -> str:
    return settings.model.resolve().name


def find_engines(settings: EngineConfig, config: Gemma3Config, device: torch.device) -> FoundEngines:
    """The TensorRT engines for this model, these settings and the card that `device` is.

    A library that is installed and does not load is passed over, which is logged, too.

    Raises
    ------
    ExecutorError
        If there are none, or no library to run them: says what was looked for and where, what builds them, and which
        library does not load, and why.
    """
    # Imported where there is a card to look at.
    from wicore_backend.executor.tensorrt.card import CudaCard

    place, pattern = settings.engines, f"*/*/{MANIFEST}"
    if place is None:  # Most have none, and what names the directory takes a second for a large checkpoint.
        place, pattern = _cache(), f"{glob.escape(_name_of_model(settings))}-*/{pattern}"
    if not any(place.glob(pattern)):
        raise ExecutorError(
            f"there are no TensorRT engines in {place / pattern}; build them with "
            f"python -m scripts.build_engines {settings.model}, or set engines to the directory that has them"
        )
    installed = installed_libraries()
    for problem in installed.broken:
        _log.warning("TensorRT: %s", problem)
    if not installed.libraries:
        load_library()  # Which says why there is none.
    card, fingerprint = CudaCard.of(device), checkpoint_fingerprint(settings.model).hex()
    wanted = [
        Wanted(
            model=fingerprint,
            precision=_engine_precision(settings),
            library=library.name,
            version=library.version,
            compute_capability=card.compute_capability,
            card=card.name,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            segments=tuple(segments(config)),
            activations=None if settings.dtype == "auto" else _setting(settings, device),
        )
        for library in installed.libraries
    ]
    store = EngineStore(engines_directory(settings, fingerprint=fingerprint))
    return FoundEngines(_first_found(store, wanted, installed.broken), installed.broken)


def _first_found(store: EngineStore, wanted: Sequence[Wanted], broken: Sequence[str]) -> EngineSet:
    reasons = []
    for one in wanted:
        try:
            return store.find(one)
        except ExecutorError as error:
            reasons.append(f"with {one.library} {one.version}, {error}")
    raise ExecutorError("; ".join([*reasons, *broken]))


def exported_precision(settings: EngineConfig, device: torch.device) -> Precision:
    """The precision of the graphs that ONNX Runtime is given on `device`.

    Raises
    ------
    ExecutorError
        If it cannot compute in it there.
    """
    dtype = _setting(settings, device)
    precision = _engine_precision(settings) or _BY_TYPE[dtype]
    if settings.dtype != "auto" and precision.activations is not dtype:
        raise ExecutorError(
            f"engine_precision = {str(precision)!r} computes in {_name(precision.activations)}, and dtype = "
            f"{settings.dtype!r}; set one of them to 'auto'"
        )
    if device.type == "cpu" and precision.activations is torch.bfloat16:
        named = "dtype" if settings.engine_precision == "auto" else "engine_precision"
        raise ExecutorError(
            f"{named} = {getattr(settings, named)!r}: ONNX Runtime multiplies no bfloat16 on a CPU; set dtype to "
            "'float32' and engine_precision to 'auto'"
        )
    return precision


def computing_type(choice: Choice, settings: EngineConfig, device: torch.device) -> torch.dtype:
    """What the chosen executor computes in.

    Raises
    ------
    ExecutorError
        If it cannot compute in what the settings say.
    """
    match choice.name:
        case ExecutorName.TORCH:
            if settings.dtype in ("auto", "bfloat16") and not _multiplies_bfloat16(device):
                raise ExecutorError(
                    f"dtype = {settings.dtype!r}: {torch.cuda.get_device_name(device)} multiplies no bfloat16, and "
                    "Gemma-3's hidden states may exceed float16, in which executor = 'torch' would keep them; set "
                    "executor to 'tensorrt' or 'onnx', which keep them in float32, or dtype to 'float32'"
                )
            return _setting(settings, device)
        case ExecutorName.ONNX:
            return exported_precision(settings, device).activations
        case ExecutorName.TENSORRT:
            assert choice.engines is not None
            return choice.engines.key.precision.activations
    assert_never(choice.name)


def _setting(settings: EngineConfig, device: torch.device) -> torch.dtype:
    """What `dtype` stands for."""
    if settings.dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float16
    dtype = getattr(torch, settings.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device does: of GPUs those since Ampere. PyTorch's own question says so of some that compute around."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _engine_precision(settings: EngineConfig) -> Precision | None:
    return None if settings.engine_precision == "auto" else Precision(settings.engine_precision)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
