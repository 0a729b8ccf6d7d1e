"""A decoder layer of one token as one kernel on Hopper: what it is compiled for, how it is shared out and called.

`kernels/streamed_layer.cu` says what it does and why. It is compiled for the sizes of a model when its executor is made
and kept on disk. It multiplies by INT4 in groups of 128, by FP8 and by bfloat16.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from wicore_backend import hopper
from wicore_backend.executor.kernels.small import overlaps
from wicore_backend.hopper import SHARED_BYTES
from wicore_backend.models.gemma3.config import TextConfig
from wicore_backend.models.gemma3.weights import LayerWeights, Weight
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

_KERNELS = Path(__file__).parent / "kernels"
SOURCE = _KERNELS / "streamed_layer.cu"
HEADERS = (
    *hopper.HEADERS,
    *(_KERNELS / name for name in ("gelu.cuh", "streamed_ring.cuh", "streamed_products.cuh", "streamed_meeting.cuh")),
)
_WIDTH, _GROUP, _ROW_BYTES = 32, 128, 128
_FEWEST_STAGES = 3
_MOST_WARPS = 11
_MOST_BLOCKS = 159

Bits = Literal[4, 8, 16]

_IN_FLIGHT: Mapping[Bits, int] = {4: 48 * 1024, 8: 116 * 1024, 16: 88 * 1024}
"""Bytes of weights on their way to a multiprocessor with which layers of 27B are fastest: what blocks tell each other
queues behind more. INT4 comes in large copies, others row by row."""
_LEAST_BYTES = 200_000_000
"""Of a layer's matrices: it was measured with 213 MB (27B in INT4), 413 MB (in FP8) and 811 MB (in bfloat16). In
smaller layers, what blocks wait for each other weighs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Ways to do the same, of which a card says what is fastest. Those of `MEASURED` have been found so.

    Attributes
    ----------
    warps
        That multiply; None for as many, 11 at most, as a tile of `hidden` inputs is shared out among in few equal
        stages: with 14 a layer of 27B takes 68.5 us in INT4 in place of 64.7 and 105.4 in FP8 in place of 104.4, with 7
        it takes 67.0 in INT4.
    in_flight
        Bytes of weights on their way to a multiprocessor; None for what suits the weights' bits.
    """

    warps: int | None = None
    in_flight: int | None = None


MEASURED = Tuning()


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    hidden, attended, fed, qkv
        Sizes: of the residual stream, of attention's result, of the MLP, of all heads.
    head_dim, qk_heads
        Of a head; and how many are normalised and rotated.
    bits
        Of a weight.
    half_scales, zeros
        Whether INT4's scales are float16, not bfloat16, and whether it has zero points.
    tuning
        How.
    """

    hidden: int
    attended: int
    fed: int
    qkv: int
    head_dim: int
    qk_heads: int
    bits: Bits
    half_scales: bool = False
    zeros: bool = False
    tuning: Tuning = MEASURED

    @classmethod
    def of(cls, config: TextConfig, layers: Sequence[LayerWeights], tuning: Tuning = MEASURED) -> Form | None:
        """The form for a model's layers; None if the kernel is not for such."""
        if any(layer.qkv_bias is not None or layer.out_bias is not None for layer in layers):
            return None
        kinds = {_kind(weight) for layer in layers for weight in _matrices(layer)}
        kind = kinds.pop()
        if kinds or kind is None:
            return None
        form = cls(
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.intermediate_size,
            config.qkv_heads * config.head_dim,
            config.head_dim,
            config.qk_heads,
            kind.bits,
            kind.half_scales,
            kind.zeros,
            tuning,
        )
        return form if form._fits() else None

    @property
    def depths(self) -> tuple[int, int, int, int]:
        """Inputs of out, of gate and up, of down and of QKV."""
        return self.attended, self.hidden, self.fed, self.hidden

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """Of outputs of each, of 16."""
        return self.hidden // TILE_ROWS, 2 * self.fed // TILE_ROWS, self.hidden // TILE_ROWS, self.qkv // TILE_ROWS

    @property
    def span(self) -> int:
        """Inputs of a span: a warp's part of a tile at once."""
        return _ROW_BYTES * 8 // self.bits

    @property
    def warps(self) -> int:
        """That multiply."""
        if self.tuning.warps is not None:
            return self.tuning.warps
        spans = self.hidden // self.span
        return -(-spans // -(-spans // _MOST_WARPS))

    @property
    def _steps(self) -> tuple[int, int, int, int]:
        """Stages of what is computed as one of each matrix."""
        out, gate_up, down, qkv = (-(-depth // (self.span * self.warps)) for depth in self.depths)
        return out, 2 * gate_up, down, qkv

    def shares(self, blocks: int) -> list[list[int]]:
        """Where each block's stages of each matrix begin, and where the last one's end: [matrices, blocks + 1]."""
        return [
            shared_out(tiles // together, steps, blocks)
            for tiles, steps, together in zip(self.tiles, self._steps, self._together, strict=True)
        ]

    @property
    def _together(self) -> tuple[int, int, int, int]:
        """Tiles of each matrix that are computed as one: of gate and up, a pair."""
        return 1, 2, 1, 1

    def launch(self, shares: Sequence[Sequence[int]], *, most_stages: int | None = None) -> Launch | None:
        """How to compile and launch it for blocks with such shares; None if there is no room in shared memory.

        The ring has as many stages as there is room for, or `most_stages`.
        """
        parts, given = [], []
        for share, steps, together in zip(shares, self._steps, self._together, strict=True):
            ends = [-(-end // steps) for end in share]
            parts.append(together * max(after - first // steps for first, after in zip(share, ends[1:], strict=False)))
            given.append(max(after - first for first, after in pairwise(ends)))
        warps = self.warps
        # x, and each warp's part of each output.
        area = max(d * 2 + tiles * warps * TILE_ROWS * 4 for d, tiles in zip(self.depths, parts, strict=True))
        sums = max(self.depths) // _GROUP * 8 if self.bits == 4 else 0
        beside = 4 * warps * 4 + sums + 144 + area
        stage = warps * TILE_ROWS * (_ROW_BYTES + (4 * (1 + self.zeros) if self.bits == 4 else 0))
        stages = (SHARED_BYTES - beside) // (stage + 16)
        if stages < _FEWEST_STAGES or len(shares[0]) > _MOST_BLOCKS + 1 or max(given) * TILE_ROWS > warps * _WIDTH:
            return None
        stages = min(stages, most_stages or stages)
        threads = (warps + 1) * _WIDTH
        in_flight = min(stages - 1, max(1, (self.tuning.in_flight or _IN_FLIGHT[self.bits]) // stage))
        return Launch(stages, in_flight, threads=threads, shared_bytes=stages * (stage + 16) + beside)

    def defines(self, launch: Launch) -> dict[str, int]:
        """For the compiler."""
        return {
            "HIDDEN": self.hidden,
            "ATTENDED": self.attended,
            "FED": self.fed,
            "QKV": self.qkv,
            "HEAD_DIM": self.head_dim,
            "QK_HEADS": self.qk_heads,
            "BITS": self.bits,
            "SCALE_HALF": int(self.half_scales),
            "ZEROS": int(self.zeros),
            "WARPS": self.warps,
            "STAGES": launch.stages,
            "FLIGHT": launch.in_flight,
        }

    def _fits(self) -> bool:
        """Whether all sizes are whole numbers of tiles, spans, groups and heads."""
        deep = all(depth % self.span == depth % _GROUP == 0 for depth in self.depths)
        return deep and self.head_dim in (_GROUP, 2 * _GROUP)


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes
    ----------
    stages, in_flight
        Of the ring; and of those, how many may be on their way at once.
    threads, shared_bytes
        Of a block.
    """

    stages: int
    in_flight: int
    threads: int
    shared_bytes: int


def shared_out(pieces: int, stages: int, blocks: int) -> list[int]:
    """Where each block's part of `pieces` with so many `stages` each begins, and where the last one's ends, in stages.

    Blocks wait for each other after each matrix, so that all get equally many stages, and a piece may be two blocks'.
    It is never three's: where there are fewer pieces than blocks, each is one block's.
    """
    if pieces < blocks:
        return [pieces * block // blocks * stages for block in range(blocks + 1)]
    return [pieces * stages * block // blocks for block in range(blocks + 1)]


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "scales", "zeros")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("out", "gate_up", "down", "qkv")),
        *((name, ctypes.c_void_p) for name in ("post_attention", "pre_feedforward", "post_feedforward", "next_norm")),
        *((name, ctypes.c_void_p) for name in ("qk_norm", "attention", "hidden", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("next_hidden", "heads", "launches")),
        *((name, ctypes.c_void_p) for name in ("told_attended", "told_fed", "told_given", "told_heads", "told_parts")),
        *((name, ctypes.c_void_p) for name in ("counters", "fed_tiles")),
        ("eps", ctypes.c_float),
        ("shares", ctypes.c_uint16 * (_MOST_BLOCKS + 1) * 4),
    ]


class LayerCalls:
    """The kernel's parameters for each layer, and what its launches share.

    Attributes
    ----------
    told
        The blocks' results as they tell each other, and parts of them, by name: of the launch before the first they
        are 0.
    launches
        The next one's number, the first's being 1.
    counters, fed_tiles
        Blocks that came to each meeting; sum and largest number of each tile of the MLP's row.
    """

    def __init__(
        self,
        form: Form,
        eps: float,
        layers: Sequence[LayerWeights],
        shares: Sequence[Sequence[int]],
    ) -> None:
        device = layers[0].input_norm.device
        self._layers = layers  # Whose memory the parameters point to.
        self._form = form
        sizes = {"attended": form.hidden, "fed": form.fed // 2, "given": form.hidden, "heads": form.qkv}
        sizes["parts"] = len(shares) * (len(shares[0]) - 1) * 2 * TILE_ROWS
        self.told = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
        self.launches = torch.ones(1, dtype=torch.int32, device=device)
        self.counters = torch.zeros(3, dtype=torch.int32, device=device)
        self.fed_tiles = torch.zeros(form.fed // TILE_ROWS, 2, device=device)
        words = self.launches, *self.told.values(), self.counters, self.fed_tiles
        lasting = [memory.data_ptr() for memory in words]
        begins = (ctypes.c_uint16 * (_MOST_BLOCKS + 1) * 4)()
        for row, share in zip(begins, shares, strict=True):
            row[: len(share)] = share
        self._parameters = [
            _Layer(
                *map(_matrix, (layer.out, layer.gate_up, layer.down, following.qkv)),
                layer.post_attention_norm.data_ptr(),
                layer.pre_feedforward_norm.data_ptr(),
                layer.post_feedforward_norm.data_ptr(),
                following.input_norm.data_ptr(),
                following.qk_norm.data_ptr(),
                *(0, 0, 0, 0, 0, 0),
                *lasting,
                eps,
                begins,
            )
            for layer, following in pairwise(layers)
        ]

    def results(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for a call's results, where `hidden` is."""
        return torch.empty_like(hidden), hidden.new_empty(1, self._form.qkv)

    def given(
        self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor, results: tuple[Tensor, Tensor]
    ) -> ctypes.Structure:
        """The parameters of `layer`, until the next call for it; what is given is told at `StreamedLayers`."""
        rows = hidden, attention, cos, sin
        assert all(x.dtype is torch.bfloat16 and x.stride(-1) == 1 for x in rows), "one row in bfloat16"
        parameters = self._parameters[layer]
        parameters.hidden, parameters.attention, parameters.cos, parameters.sin = (x.data_ptr() for x in rows)
        parameters.next_hidden, parameters.heads = (x.data_ptr() for x in results)
        return parameters


class StreamedLayers:
    """From each layer's attention to the next one's, for one token in bfloat16.

    Its launches share memory: they go to one stream, or to streams that wait for each other. All blocks of one run at
    the same time, one a multiprocessor; it waits until it has them all.

    Raises
    ------
    RuntimeError
        If the kernel cannot be compiled, or not all its blocks run at the same time on this card.
    """

    def __init__(self, form: Form, eps: float, layers: Sequence[LayerWeights], device: torch.device) -> None:
        # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
        from wicore_backend.hopper.nvrtc import Kernel

        self._form = form
        self._device = device
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count
        shares = form.shares(self._blocks)
        launch = form.launch(shares)
        if launch is None:
            raise RuntimeError(f"a layer of {form} does not fit {self._blocks} multiprocessors")
        self._kernel: Kernel = Kernel.of(
            SOURCE,
            HEADERS,
            form.defines(launch),
            threads=launch.threads,
            shared_bytes=launch.shared_bytes,
            cooperative=True,
        )
        self._calls = LayerCalls(form, eps, layers, shares)
        self._try_out()

    def __call__(
        self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [1, D] after `layer`, and the heads [1, (Hq + 2 Hkv) d] of the next layer.

        `hidden` is [1, D], `attention` [1, Hq d], `cos` and `sin` [1, d] of the next layer.
        """
        results = self._calls.results(hidden)
        self._kernel.launch(self._blocks, self._calls.given(layer, hidden, attention, cos, sin, results))
        return results

    def _try_out(self) -> None:
        """Launch it once, so that a card that does not take it says so here."""
        form, device = self._form, self._device
        sizes = form.hidden, form.attended, form.head_dim, form.head_dim
        self(0, *(torch.zeros(1, size, dtype=torch.bfloat16, device=device) for size in sizes))
        torch.cuda.synchronize(device)


def streamed_layers(config: TextConfig, layers: Sequence[LayerWeights]) -> StreamedLayers | None:
    """The layers of a model as such; None if the card or the model is another kind, or what compiles it is missing."""
    norm = layers[0].input_norm
    if not overlaps(norm) or len(layers) < 2 or sum(w.nbytes for w in _matrices(layers[0])) < _LEAST_BYTES:
        return None
    form = Form.of(config, layers)
    if form is None:
        return None
    try:
        return StreamedLayers(form, config.rms_norm_eps, layers, norm.device)
    except (ImportError, OSError, RuntimeError):
        _log.warning("layers of one token run as several kernels each, which is slower", exc_info=True)
        return None


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the kernel must know of a matrix besides its shape."""

    bits: Bits
    half_scales: bool = False
    zeros: bool = False


def _matrices(layer: LayerWeights) -> tuple[Weight, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _kind(weight: Weight) -> _Kind | None:
    """None if the kernel does not multiply by such a matrix."""
    if weight.dtype is not torch.bfloat16:
        return None
    if isinstance(weight, Tensor):
        return _Kind(16) if _copied_at_once(weight) else None
    if isinstance(weight, Fp8Matrix):
        return _Kind(8) if _copied_at_once(weight.values) else None
    if isinstance(weight, Int4Matrix):
        tiled = weight.codes.shape[2] == TILE_ROWS and weight.scales.shape[3] == 2 and weight.group == _GROUP
        tensors = [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]
        if tiled and all(map(_copied_at_once, tensors)):
            return _Kind(4, weight.scales.dtype is torch.float16, weight.zeros is not None)
    return None


def _copied_at_once(tensor: Tensor) -> bool:
    """Whether its rows can be copied as bytes that lie together, from an address that bulk copies take."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _matrix(weight: Weight) -> _Matrix:
    if isinstance(weight, Tensor):
        return _Matrix(weight.data_ptr(), None, None)
    if isinstance(weight, Fp8Matrix):
        return _Matrix(weight.values.data_ptr(), weight.scale.data_ptr(), None)
    assert isinstance(weight, Int4Matrix)
    zeros = None if weight.zeros is None else weight.zeros.data_ptr()
    return _Matrix(weight.codes.data_ptr(), weight.scales.data_ptr(), zeros)
