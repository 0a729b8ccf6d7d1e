"""The two TensorRT libraries, and where they differ."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import Any, Literal

import torch

from wicore_backend.errors import ExecutorError

_log = logging.getLogger(__name__)


class LibraryName(StrEnum):
    """Whose engines these are; those of one library are nothing to the other."""

    TENSORRT = "tensorrt"
    """From NVIDIA's images, for data centre cards too. Builds for the card that it finds, and times kernels there."""
    TENSORRT_RTX = "tensorrt_rtx"
    """For GeForce, RTX and cards like them. Builds for cards that are not there; compiles kernels when it is run."""


LibraryChoice = Literal["auto", "tensorrt", "tensorrt_rtx"]

_MODULES: Mapping[LibraryName, tuple[str, ...]] = {
    LibraryName.TENSORRT: ("tensorrt", "tensorrt_bindings"),
    LibraryName.TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_REMEDIES: Mapping[LibraryName, str] = {
    LibraryName.TENSORRT: "use an image of NVIDIA's that has it (nvcr.io/nvidia/tritonserver:*-py3: Dockerfile.triton)",
    LibraryName.TENSORRT_RTX: "pip install 'wicore[tensorrt-rtx]'",
}
_TYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT library.

    Attributes
    ----------
    version
        Its own: an engine runs with the version that built it.
    api
        Its Python module.
    """

    name: LibraryName
    version: str
    api: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def builds_for_other_cards(self) -> bool:
        """Engines are built for the card that is asked for. Otherwise they are for the one that is there."""
        return hasattr(self.api, "ComputeCapability")

    @property
    def configures_contexts(self) -> bool:
        """Contexts take an `IRuntimeConfig`: with a cache of compiled kernels and a say in when those are compiled."""
        return hasattr(self.api, "IRuntimeCache")

    @property
    def times_kernels(self) -> bool:
        """Building is measuring: timings are worth keeping, and there is a level of optimisation to choose."""
        return self.name is LibraryName.TENSORRT

    def target(self, compute_capability: str) -> Any:
        """The library's word for "sm89".

        Raises
        ------
        ExecutorError
            If it cannot build for that card.
        """
        wanted = getattr(self.api.ComputeCapability, compute_capability.upper(), None)
        if wanted is None or not compute_capability.startswith("sm"):
            names = [name.lower() for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
            able = ", ".join(sorted(names, key=lambda name: int(name.removeprefix("sm"))))
            remedy = _REMEDIES[LibraryName.TENSORRT]
            raise ExecutorError(f"{self} cannot build for {compute_capability}, only for {able}; for others {remedy}")
        return wanted

    def dtype(self, dtype: Any) -> torch.dtype | str:
        """PyTorch's word for a type of the library's, or the library's own where PyTorch has none."""
        name = str(dtype.name)
        return _TYPES.get(name, name)

    def messages(self) -> Messages:
        """What the library logs from now on, and the logger that its objects are given."""
        return messages_of(self.api)


_NO_ERROR = "the library logged no error"


class Messages:
    """What the library logs while one of its users has this, kept for errors to quote.

    Attributes
    ----------
    logger
        The library's `ILogger`: the same for all, see `messages_of`.
    activations, weights
        Bytes that the library said that an engine's activations take, one number for each profile, and its weights.
    description
        What it said of the last engine that it built, for `report_of_description`.
    """

    _MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.activations: list[int] = []
        self.weights: list[int] = []
        self.description: str | None = None
        self._errors: dict[int, deque[str]] = {}  # By thread.

    def note(self, level: int, text: str) -> None:
        """One message. On any thread."""
        if level >= logging.ERROR:
            self._errors.setdefault(threading.get_ident(), deque(maxlen=4)).append(text)
        if found := self._MEMORY.search(text):
            (self.activations if found[1] == "Activation" else self.weights).append(int(found[2]))

    def errors(self) -> str:
        """The last errors, which are forgotten by that: this thread's or, if it has none, others', who may have been
        another user's. What to quote where there were none."""
        if said := self._errors.pop(threading.get_ident(), None):
            return "; ".join(said)
        others: list[str] = []
        while self._errors:
            others += self._errors.popitem()[1]
        return f"on another thread: {'; '.join(others)}" if others else _NO_ERROR

    def own_errors(self) -> str:
        """`errors` of this thread alone, where others do the same for the same user."""
        return "; ".join(self._errors.pop(threading.get_ident(), ())) or _NO_ERROR


class _Listeners:
    """Sends what a library logs to this process's log, and to all who listen."""

    def __init__(self, api: Any) -> None:
        severity = api.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.DEBUG,
        }
        self._listening: weakref.WeakSet[Messages] = weakref.WeakSet()
        self._lock = threading.Lock()
        listeners = self

        class Forward(api.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                api.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in levels:
                    text = msg.strip()
                    _log.log(levels[severity], "%s", text)
                    for messages in listeners._now():
                        messages.note(levels[severity], text)
                elif msg.startswith("Layers:\n"):
                    for messages in listeners._now():
                        messages.description = msg

        self._logger = Forward()

    def join(self) -> Messages:
        messages = Messages(self._logger)
        with self._lock:
            self._listening.add(messages)
        return messages

    def _now(self) -> list[Messages]:
        with self._lock:
            return list(self._listening)


_LISTENERS: dict[type, _Listeners] = {}
_MAKING = threading.Lock()


def messages_of(api: Any) -> Messages:
    """`Messages` of a library with the module `api`, from now on.

    A library knows one logger in a process, the first that it is given, and ignores others with a warning. So there is
    one, which tells all who listen: of several models in a process each hears of its own faults.
    """
    with _MAKING:
        if api.ILogger not in _LISTENERS:
            _LISTENERS[api.ILogger] = _Listeners(api)
        return _LISTENERS[api.ILogger].join()


@dataclass(frozen=True, slots=True)
class Installed:
    """The TensorRT libraries of this machine.

    Attributes
    ----------
    libraries
        Those that can be used, TensorRT first: an image may have both.
    broken
        What is there and does not load, with the reason.
    """

    libraries: tuple[Library, ...]
    broken: tuple[str, ...]


def installed_libraries() -> Installed:
    """Import each library that there is."""
    libraries, broken = [], list[str]()
    for name in LibraryName:
        library, problems = _imported(name)
        broken += problems
        if library is not None:
            libraries.append(library)
    return Installed(tuple(libraries), tuple(broken))


def load_library(choice: LibraryChoice = "auto") -> Library:
    """Import the library that is asked for; "auto" takes TensorRT, or else TensorRT-RTX.

    Raises
    ------
    ExecutorError
        If it is not there, or does not load, with what to do.
    """
    names = tuple(LibraryName) if choice == "auto" else (LibraryName(choice),)
    broken: list[str] = []
    for name in names:
        library, problems = _imported(name)
        broken += problems
        if library is not None:
            for problem in broken:
                _log.warning("%s; %s serves in its place", problem, library)
            return library
    remedies = ", or ".join(f"for {name}: {_REMEDIES[name]}" for name in names)
    raise ExecutorError("; ".join([f"no {' or '.join(names)} library here", *broken, remedies]))


def _imported(name: LibraryName) -> tuple[Library | None, list[str]]:
    """A library, if one of its modules loads, and what is wrong with those before that are there and do not."""
    problems: list[str] = []
    for module in _MODULES[name]:
        try:
            api = import_module(module)
            return Library(name, str(api.__version__), api), problems
        except Exception as error:  # A package that is half there fails in ways of its own.
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                problems.append(f"{module} does not load: {error}")
    return None, problems
