"""Kernels in CUDA C++, compiled when they are needed by the NVRTC that PyTorch's CUDA builds bring, and launched.

Whoever has PyTorch for CUDA 13 has `cuda-bindings` and NVRTC with it; no toolkit is needed, and a source that includes
nothing needs no headers. What has been compiled is kept in the user's cache directory by what it was compiled of.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from wicore_backend.hopper import ARCHITECTURE

_log = logging.getLogger(__name__)


def compiled(source: Path, headers: Sequence[Path], defines: Mapping[str, int], *, architecture: str) -> bytes:
    """Machine code of `source`, which may include `headers` by their names, for `architecture`: sm_90a.

    Raises
    ------
    RuntimeError
        If it cannot be compiled; has the compiler's log.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    texts = {file.name: file.read_text() for file in (source, *headers)}
    what = "\0".join((*texts.values(), *options, str(_checked(nvrtc.nvrtcVersion()))))
    kept = _kept(f"{source.stem}-{hashlib.sha256(what.encode()).hexdigest()[:32]}.cubin")
    if kept is not None and kept.is_file():
        return kept.read_bytes()
    code = _compiled(source.name, texts, options)
    if kept is not None:
        _keep(code, kept)
    return code


class Kernel:
    """A kernel of machine code `code`, on the current device.

    Parameters
    ----------
    name
        Of the function, `extern "C"`.
    threads, shared_bytes
        Of a block.
    cooperative
        Whether all blocks of a launch run at the same time.

    Raises
    ------
    RuntimeError
        If the driver does not take the code.
    """

    def __init__(self, code: bytes, name: str, *, threads: int, shared_bytes: int, cooperative: bool) -> None:
        self._module = _checked(driver.cuModuleLoadData(code))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        self._threads = threads
        self._shared_bytes = shared_bytes
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, shared_bytes))
        self._attributes = [_attribute("PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed")]
        if cooperative:
            self._attributes.append(_attribute("COOPERATIVE", "cooperative"))

    @classmethod
    def of(
        cls,
        source: Path,
        headers: Sequence[Path],
        defines: Mapping[str, int],
        *,
        threads: int,
        shared_bytes: int,
        cooperative: bool,
    ) -> Self:
        """The function of a source's name, compiled for Hopper; otherwise as `compiled` and the class have it."""
        code = compiled(source, headers, defines, architecture=ARCHITECTURE)
        return cls(code, source.stem, threads=threads, shared_bytes=shared_bytes, cooperative=cooperative)

    def launch(self, blocks: int, parameters: ctypes.Structure) -> None:
        """Launch it on PyTorch's current stream with `parameters` as its only one.

        It may start before what it follows has ended (programmatic dependent launch).
        """
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        places = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(places), 0))


TensorMap = ctypes.c_uint64 * 16
"""A matrix in global memory, of which kernels copy boxes."""


def tensor_map(matrix: Tensor, *, box_rows: int, box_matrices: int | None = None) -> ctypes.Array[ctypes.c_uint64]:
    """Of `matrix` [R, C], 16 bits a number, for boxes of [box_rows, 64]; `hopper.cuh` says how they lie (`copy_box`).

    Of several matrices [M, R, C] boxes are [box_matrices, box_rows, 64].

    It is of the memory, not the tensor: that has to stay for as long as the map is used.

    Raises
    ------
    RuntimeError
        If the driver refuses: rows that do not begin at multiples of 16 bytes, or lie too far apart.
    """
    types = driver.CUtensorMapDataType
    sizes, box = [*reversed(matrix.shape)], [64, box_rows, *([] if box_matrices is None else [box_matrices])]
    apart = [*reversed(matrix.stride())][1:]
    if sizes[1:] == [1]:
        apart = [sizes[0]]  # Of one row it may be anything.
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
            if matrix.dtype is torch.float16
            else types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            *(len(sizes), matrix.data_ptr(), [driver.cuuint64_t(size) for size in sizes]),
            [driver.cuuint64_t(each * matrix.itemsize) for each in apart],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(box),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap(*map(int, made.opaque))


def _attribute(name: str, value: str) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    setattr(attribute.value, value, 1)
    return attribute


def _compiled(name: str, texts: Mapping[str, str], options: Sequence[str]) -> bytes:
    headers = [(text.encode(), header.encode()) for header, text in texts.items() if header != name]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            *(texts[name].encode(), name.encode(), len(headers)),
            *([text for text, _ in headers], [header for _, header in headers]),
        )
    )
    try:
        given = [option.encode() for option in options]
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{name} cannot be compiled: {log.decode(errors='replace')}")
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _kept(file: str) -> Path | None:
    """Where code of that name is kept; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wicore" / file
    except RuntimeError:
        return None


def _keep(code: bytes, target: Path) -> None:
    """Write `target` at once or not at all: others may read it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, target)
    except OSError as error:
        _log.warning("%s will be compiled again by the next process: %s", target.name, error)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings gave besides its status: nothing, a value, or several."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA refuses: {status!r}")
    return values[0] if len(values) == 1 else tuple(values)
