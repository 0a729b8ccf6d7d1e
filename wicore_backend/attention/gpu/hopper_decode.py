"""Decodes on Hopper by a kernel of their own, which shares a step's keys out evenly: `kernels/decode_hopper.cu`.

It is compiled for a model's heads and the type of its pools when its attention is made, and kept on disk. It takes up
to 64 sequences in bfloat16, over pools in bfloat16 or FP8; more of them have `kernels/decode.py`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wicore_backend.attention.gpu.schedule import WORK_FIELDS, WORK_KEYS
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hopper import HEADERS, SHARED_BYTES

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "kernels" / "decode_hopper.cu"
MOST = 64
"""Sequences of a step: of 128 the other kernel's programs hide each other's waits as well, and none idles."""
_FEW = 8
_WIDTH, _COLUMNS = 32, 8
_OF_BLOCK = 1024  # bytes of shared memory that a block takes besides those that it asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How the kernel is cut.

    Attributes
    ----------
    warps
        Of a block that attend, if the ring has as many stages.
    blocks
        Of a multiprocessor.
    stages
        Tiles of a block's ring, at most.
    least
        Tiles of a block, where there are as many.
    """

    warps: int = 4
    blocks: int = 2
    stages: int = 4
    least: int = 1


SEVERAL = Tuning()
DEEP = Tuning(warps=4, blocks=1, stages=12, least=5)
"""With more tiles on their way."""
SEVERAL_FP8 = Tuning(warps=6, blocks=2, stages=12, least=5)
DEEP_FP8 = Tuning(warps=6, blocks=1, stages=24, least=5)


class Tunings(NamedTuple):
    """What is taken over pools of one type.

    Attributes
    ----------
    few, several
        For up to `_FEW` sequences, and for more. `several` has the most blocks.
    of_global
        For global layers, however many sequences. Their keys lie on so many pages of memory that each tile waits for
        its page (docs/benchmarks/attention-on-gpu.md).
    """

    few: Tuning
    several: Tuning
    of_global: Tuning

    def of(self, group: LayerGroup, sequences: int) -> Tuning:
        if group is LayerGroup.GLOBAL:
            return self.of_global
        return self.few if sequences <= _FEW else self.several


TUNED: Mapping[torch.dtype, Tunings] = {
    torch.bfloat16: Tunings(few=DEEP, several=SEVERAL, of_global=DEEP),
    # Tiles have half the bytes: for as many on their way there are more of them, and for these more warps.
    FP8: Tunings(few=DEEP_FP8, several=SEVERAL_FP8, of_global=SEVERAL_FP8),
}


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    group
        Query heads of a KV head.
    most_sequences
        Of a step.
    pool
        The type of keys and values in the pool, bfloat16 or FP8.
    """

    head_dim: int
    kv_heads: int
    group: int
    block_size: int
    most_sequences: int = MOST
    tuning: Tuning = SEVERAL
    pool: torch.dtype = torch.bfloat16

    @property
    def fits(self) -> bool:
        """Whether the kernel is for such heads and blocks."""
        return (
            self.head_dim in (128, 256)
            and self.block_size % WORK_KEYS == 0
            and self.group <= _COLUMNS
            and self.stages > 0
        )

    @property
    def warps(self) -> int:
        """Of a block that attend: as many as have a stage each; 0 if there is no room for one."""
        return next((warps for warps in range(self.tuning.warps, 0, -1) if self._fit(warps) >= warps), 0)

    @property
    def threads(self) -> int:
        """Of a block: its last warp copies."""
        return (self.warps + 1) * _WIDTH

    @property
    def stages(self) -> int:
        """Of the ring: a multiple of the warps, so that what comes into a stage is always the same one's."""
        warps = self.warps
        return self._fit(warps) // warps * warps if warps else 0

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.stages * self._of_stage + self._beside(self.warps)

    @property
    def _of_stage(self) -> int:
        """Keys and values of a tile, and two barriers."""
        return 2 * WORK_KEYS * self.head_dim * self.pool.itemsize + 2 * 8

    def _beside(self, warps: int) -> int:
        """The sequences, and what the warps put together, of one run and of the next."""
        of_run = warps * self.group * (self.head_dim * 4 + 8)
        return (self.most_sequences + 1) * WORK_FIELDS * 4 + 2 * of_run + 16

    def _fit(self, warps: int) -> int:
        """Stages beside what so many warps leave."""
        room = SHARED_BYTES // self.tuning.blocks - _OF_BLOCK - self._beside(warps)
        return min(self.tuning.stages, room // self._of_stage)

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {
            "HEAD_DIM": self.head_dim,
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "BLOCK_SIZE": self.block_size,
            "MOST_SEQUENCES": self.most_sequences,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "LEAST": self.tuning.least,
            "POOL_BITS": 8 * self.pool.itemsize,
        }


class _Decode(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "pool", "out", "work", "tables")),
        *((name, ctypes.c_void_p) for name in ("parts", "stats", "arrived", "mass_at", "mass")),
        *((name, ctypes.c_longlong) for name in ("layer_at", "block_stride")),
        *((name, ctypes.c_int) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        ("sequences", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class Calls:
    """The kernel's parameters, and what the blocks of a launch leave for each other.

    Parameters
    ----------
    blocks
        Of a launch.
    scale
        Of scores, which are powers of two.

    Attributes
    ----------
    parts, stats
        float32 [blocks, 2, group, d] and [blocks, 2, group, 2], of a sequence and head that is several blocks'.
    arrived
        int32 [sequences, KV heads], 0 between launches.
    """

    def __init__(self, form: Form, *, blocks: int, scale: float, device: torch.device) -> None:
        self._scale = scale
        self.parts = torch.empty(blocks, 2, form.group, form.head_dim, device=device)
        self.stats = torch.empty(blocks, 2, form.group, 2, device=device)
        self.arrived = torch.zeros(form.most_sequences, form.kv_heads, dtype=torch.int32, device=device)

    def given(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool: Tensor,
        out: Tensor,
        work: Tensor,
        tables: Tensor,
        *,
        layer_at: int,
        block_stride: int,
        mass_at: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> ctypes.Structure:
        """For the decodes of `work`, int32 [(sequences + 1) * WORK_FIELDS]; the others are as for `decode_kernel`, but
        that `mass_at` is of this layer alone."""
        return _Decode(
            *(tensor.data_ptr() for tensor in (q, k, v, pool, out, work, tables)),
            *(tensor.data_ptr() for tensor in (self.parts, self.stats, self.arrived)),
            *(None if tensor is None else tensor.data_ptr() for tensor in (mass_at, mass)),
            layer_at * pool.itemsize,
            block_stride * pool.itemsize,
            *(stride * tensor.itemsize for tensor in (q, k, v) for stride in tensor.stride()[:2]),
            len(work) // WORK_FIELDS - 1,
            self._scale,
        )


class HopperDecode:
    """Attention of a layer for some decodes of a step.

    Its launches share memory: they go to one stream, or to streams that wait for each other.

    Parameters
    ----------
    form
        As `form_of` gives it; it is compiled for each of its pool's `TUNED`.
    processors, scale
        Multiprocessors of the device; of scores, which are powers of two.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled.
    """

    def __init__(self, form: Form, *, processors: int, scale: float, device: torch.device) -> None:
        # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
        from wicore_backend.hopper.nvrtc import Kernel

        def kernel(form: Form) -> tuple[Kernel, int]:
            made = Kernel.of(
                SOURCE, HEADERS, form.defines(), threads=form.threads, shared_bytes=form.shared_bytes, cooperative=False
            )
            return made, processors * form.tuning.blocks

        self._tunings = TUNED[form.pool]
        self._kernels = {tuning: kernel(replace(form, tuning=tuning)) for tuning in set(self._tunings)}
        self._calls = Calls(form, blocks=processors * form.tuning.blocks, scale=scale, device=device)

    def __call__(self, group: LayerGroup, sequences: int, *tensors: Tensor, **more: Any) -> None:
        """For a layer of that group and so many decodes, `MOST` at most; as `Calls.given`, on the current stream."""
        kernel, blocks = self._kernels[self._tunings.of(group, sequences)]
        kernel.launch(blocks, self._calls.given(*tensors, **more))


def form_of(tiling: Tiling, pool: torch.dtype, queries: torch.dtype, *, capped: bool) -> Form | None:
    """The form for a model's heads and several sequences; None if the kernel is not for such heads, pools or scores
    that are `capped`."""
    layout = tiling.layout
    if pool not in TUNED or queries != torch.bfloat16 or capped or tiling.cell != WORK_KEYS:
        return None
    tuning = TUNED[pool].several
    form = Form(layout.head_dim, layout.kv_heads, tiling.group, layout.block_size, tuning=tuning, pool=pool)
    return form if form.fits and tiling.processors >= layout.kv_heads else None


def hopper_decode(form: Form | None, *, processors: int, scale: float, device: torch.device) -> HopperDecode | None:
    """The kernel on this device; None if that is of another kind, or has not what compiles it."""
    if form is None or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return HopperDecode(form, processors=processors, scale=scale, device=device)
    except (ImportError, OSError, RuntimeError):
        _log.warning("attention of decodes is not shared out evenly, which is slower", exc_info=True)
        return None
