"""Kernels in CUDA C++ on a CPU: g++ compiles them with a twin of `hopper.cuh`; `machine.hpp` tells who runs them."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_HERE = Path(__file__).parent
_OPTIONS = ("-std=c++17", "-fPIC", "-Wno-unknown-pragmas", "-ffp-contract=off", "-I", str(_HERE))
# The compiler reports each access of the kernel; who listens is `machine.cpp`, not the sanitizer's library.
_REPORTING = ("-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


class KernelError(AssertionError):
    """What the machine found wrong in a run."""


class _Region(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("mutable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    ]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a kernel may access: tensors by name, those it only reads and those it writes."""

    constant: Mapping[str, Tensor]
    mutable: Mapping[str, Tensor]

    def regions(self) -> ctypes.Array[_Region]:
        kinds = (*((0, item) for item in self.constant.items()), *((1, item) for item in self.mutable.items()))
        found = [_Region(t.data_ptr(), t.nbytes, kind, name.encode()) for kind, (name, t) in kinds if t.nbytes]
        return (_Region * len(found))(*found)


class HostKernel:
    """A kernel of a file, compiled for this machine's CPU.

    Parameters
    ----------
    source
        Its file, with headers beside it that it includes but for `hopper.cuh`; texts that tests have changed are given
        in place of files'.
    parameter
        Type of the kernel's only parameter, of the same name as its file.

    Raises
    ------
    RuntimeError
        If g++ does not take it; has its messages.
    """

    def __init__(self, source: Path, texts: Mapping[str, str], defines: Mapping[str, int], *, parameter: str) -> None:
        self._library = ctypes.CDLL(str(_compiled(source, texts, defines, parameter)))
        self._library.run.restype = ctypes.c_char_p
        self._library.run.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_uint] * 4,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_ulonglong,
        ]

    def run(
        self,
        launches: Sequence[ctypes.Structure],
        memory: Memory,
        *,
        blocks: int,
        threads: int,
        shared_bytes: int,
        seed: int,
    ) -> None:
        """Launch it once with each of `launches`, in a stream.

        Raises
        ------
        KernelError
            If anything was wrong, though by luck its results may be right.
        """
        places = (ctypes.c_void_p * len(launches))(*map(ctypes.addressof, launches))
        regions = memory.regions()
        fault = self._library.run(
            places, len(launches), blocks, threads, shared_bytes, regions, len(regions), seed
        ).decode()
        if fault:
            raise KernelError(f"{fault}, with seed {seed}")


def gxx() -> str | None:
    """The compiler; None if there is none."""
    return shutil.which("g++")


@functools.cache
def _directory() -> Path:
    place = Path(tempfile.mkdtemp(prefix="hopper-twin-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _compiled(source: Path, texts: Mapping[str, str], defines: Mapping[str, int], parameter: str) -> Path:
    what = repr((sorted(texts.items()), sorted(defines.items())))
    place = _directory() / hashlib.sha256(what.encode()).hexdigest()[:16]
    library = place / "kernel.so"
    if library.exists():
        return library
    place.mkdir(exist_ok=True)
    for name, text in texts.items():
        if name != "hopper.cuh":
            (place / name).write_text(text)
    calls = f'extern "C" void kernel(const void* given) {{ {source.stem}(*(const {parameter}*)given); }}\n'
    (place / "kernel.cpp").write_text(f'#include "{source.name}"\n{calls}')
    given = [f"-D{name}={value}" for name, value in defines.items()]
    _gxx(*_OPTIONS, *_REPORTING, *given, "-c", place / "kernel.cpp", "-o", place / "kernel.o")
    _gxx("-shared", place / "kernel.o", *_machine(), "-o", place / f"kernel.{os.getpid()}")
    (place / f"kernel.{os.getpid()}").rename(library)
    return library


@functools.cache
def _machine() -> tuple[Path, ...]:
    objects = []
    for source in ("machine.cpp", "fibers.cpp", "numbers.cpp", "warpgroups.cpp"):
        objects.append(_directory() / f"{source}.o")
        _gxx(*_OPTIONS, "-O2", "-U_FORTIFY_SOURCE", "-c", _HERE / source, "-o", objects[-1])
    return tuple(objects)


def _gxx(*arguments: str | Path) -> None:
    result = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"g++ refuses: {result.stderr[-4000:]}")
