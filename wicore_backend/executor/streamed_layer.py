"""A decoder layer of one token as one kernel on Hopper: how it is called.

`kernels/streamed_layer.cu` says what it does and why. It is compiled for the sizes of a model (`streamed_form.py`) when
its executor is made and kept on disk; once more, with attention in it, when the first local layer's pool is seen. It
multiplies by INT4 in groups of 128, by FP8 and by bfloat16.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wicore_backend import hopper
from wicore_backend.attention.base import Unattended
from wicore_backend.executor.kernels.small import overlaps
from wicore_backend.executor.streamed_form import MOST_BLOCKS, Form, Launch, Pool, matrices_of
from wicore_backend.models.gemma3.config import TextConfig
from wicore_backend.models.gemma3.weights import LayerWeights, Weight
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

_log = logging.getLogger(__name__)

_KERNELS = Path(__file__).parent / "kernels"
SOURCE = _KERNELS / "streamed_layer.cu"
_PARTS = ("ring", "products", "meeting", "attention")
HEADERS = (
    *hopper.HEADERS,
    hopper.ATTENTION,
    _KERNELS / "gelu.cuh",
    *(_KERNELS / f"streamed_{part}.cuh" for part in _PARTS),
)
_LEAST_BYTES = 200_000_000
"""Of a layer's matrices: it was measured with 213 MB (27B in INT4), 413 MB (in FP8) and 811 MB (in bfloat16). In
smaller layers, what blocks wait for each other weighs more."""


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "scales", "zeros")]


class _Keys(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "pool", "work", "tables")),
        *((name, ctypes.c_longlong) for name in ("layer_at", "block_stride")),
        *((name, ctypes.c_void_p) for name in ("parts", "stats")),
        ("scale", ctypes.c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("out", "gate_up", "down", "qkv")),
        *((name, ctypes.c_void_p) for name in ("post_attention", "pre_feedforward", "post_feedforward", "next_norm")),
        *((name, ctypes.c_void_p) for name in ("qk_norm", "attention", "hidden", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("next_hidden", "heads", "launches")),
        *((name, ctypes.c_void_p) for name in ("told_attended", "told_fed", "told_given", "told_heads", "told_parts")),
        *((name, ctypes.c_void_p) for name in ("counters", "fed_tiles")),
        ("eps", ctypes.c_float),
        ("shares", ctypes.c_uint16 * (MOST_BLOCKS + 1) * 4),
        ("keys", _Keys),
    ]


class LayerCalls:
    """The kernel's parameters for each layer, and what its launches share.

    Attributes
    ----------
    told
        The blocks' results as they tell each other, and parts of them, by name: of the launch before the first they
        are 0.
    launches
        The next one's number, the first's being 1, and the next one's of those that attend themselves.
    counters, fed_tiles
        Blocks that came to each meeting; sum and largest number of each tile of the MLP's row.
    parts, stats
        Of attention: what each block has of a head, bfloat16 [parts, Hq d], float32 [parts, Hq, 2].
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
        self.launches = torch.ones(2, dtype=torch.int32, device=device)
        self.counters = torch.zeros(4, dtype=torch.int32, device=device)
        self.fed_tiles = torch.zeros(form.fed // TILE_ROWS, 2, device=device)
        parts = (len(shares[0]) - 1) // form.kv_heads
        self.parts = torch.empty(parts, form.attended, dtype=torch.bfloat16, device=device)
        self.stats = torch.empty(parts, form.attended // form.head_dim, 2, device=device)
        words = self.launches, *self.told.values(), self.counters, self.fed_tiles
        lasting = [memory.data_ptr() for memory in words]
        begins = (ctypes.c_uint16 * (MOST_BLOCKS + 1) * 4)()
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
                _Keys(parts=self.parts.data_ptr(), stats=self.stats.data_ptr()),
            )
            for layer, following in pairwise(layers)
        ]

    def results(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for a call's results, where `hidden` is."""
        return torch.empty_like(hidden), hidden.new_empty(1, self._form.qkv)

    def given(
        self,
        layer: int,
        hidden: Tensor,
        attention: Tensor | Unattended,
        cos: Tensor,
        sin: Tensor,
        results: tuple[Tensor, Tensor],
    ) -> ctypes.Structure:
        """The parameters of `layer`, until the next call for it; what is given is told at `StreamedLayers`."""
        rows = (attention.q, attention.k, attention.v) if isinstance(attention, Unattended) else (attention,)
        rows = hidden, cos, sin, *rows
        assert all(x.dtype is torch.bfloat16 and x.stride(-1) == 1 for x in rows), "one row in bfloat16"
        parameters = self._parameters[layer]
        parameters.hidden, parameters.cos, parameters.sin = (x.data_ptr() for x in (hidden, cos, sin))
        parameters.next_hidden, parameters.heads = (x.data_ptr() for x in results)
        if isinstance(attention, Unattended):
            keys = parameters.keys
            for name in ("q", "k", "v", "pool", "work", "tables"):
                setattr(keys, name, getattr(attention, name).data_ptr())
            keys.layer_at, keys.block_stride = attention.layer_at, attention.block_stride
            keys.scale = attention.scale
        else:
            parameters.attention = attention.data_ptr()
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
        self._form = form
        self._device = device
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernel = self._compiled(form)
        self._attending: dict[Pool, Kernel | None] = {}
        self._calls = LayerCalls(form, eps, layers, form.shares(self._blocks))
        sizes = form.hidden, form.attended, form.head_dim, form.head_dim
        self._idle = [torch.zeros(1, size, dtype=torch.bfloat16, device=device) for size in sizes]
        self._try_out(self._kernel, self._idle[1])

    def attends(self, attention: Unattended) -> bool:
        """Whether a layer's call takes that in place of attention's result; compiles it for whoever asks first."""
        return self._attending_kernel(attention) is not None

    def __call__(
        self, layer: int, hidden: Tensor, attention: Tensor | Unattended, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [1, D] after `layer`, and the heads [1, (Hq + 2 Hkv) d] of the next layer.

        `hidden` is [1, D], `attention` [1, Hq d] or such as it `attends`, `cos` and `sin` [1, d] of the next layer.
        """
        kernel = self._attending_kernel(attention) if isinstance(attention, Unattended) else self._kernel
        assert kernel is not None, "only what `attends` says is left to it"
        results = self._calls.results(hidden)
        kernel.launch(self._blocks, self._calls.given(layer, hidden, attention, cos, sin, results))
        return results

    def _attending_kernel(self, attention: Unattended) -> Kernel | None:
        pool = Pool(attention.block_size, 8 * attention.pool.itemsize)
        if pool not in self._attending:
            self._attending[pool] = self._compiled_attending(pool, attention)
        return self._attending[pool]

    def _compiled_attending(self, pool: Pool, attention: Unattended) -> Kernel | None:
        form = replace(self._form, pool=pool)
        heads = (form.members * form.kv_heads, form.kv_heads, form.kv_heads)
        if [x.shape[1] for x in (attention.q, attention.k, attention.v)] != list(heads) or self._launch(form) is None:
            return None
        try:
            kernel = self._compiled(form)
            self._try_out(kernel, replace(attention, work=torch.zeros_like(attention.work)))  # Of no token.
        except (ImportError, OSError, RuntimeError):
            _log.warning(
                "local layers of one token have attention as a kernel of its own, which is slower", exc_info=True
            )
            return None
        return kernel

    def _launch(self, form: Form) -> Launch | None:
        return form.launch(form.shares(self._blocks))

    def _compiled(self, form: Form) -> Kernel:
        # Imported where it is used: only PyTorch's builds for CUDA bring what it needs.
        from wicore_backend.hopper.nvrtc import Kernel

        launch = self._launch(form)
        if launch is None:
            raise RuntimeError(f"a layer of {form} does not fit {self._blocks} multiprocessors")
        return Kernel.of(
            SOURCE,
            HEADERS,
            form.defines(launch),
            threads=launch.threads,
            shared_bytes=launch.shared_bytes,
            cooperative=True,
        )

    def _try_out(self, kernel: Kernel, attention: Tensor | Unattended) -> None:
        """Launch it once, so that a card that does not take it says so here."""
        hidden, _, cos, sin = self._idle
        results = self._calls.results(hidden)
        kernel.launch(self._blocks, self._calls.given(0, hidden, attention, cos, sin, results))
        torch.cuda.synchronize(self._device)


def streamed_layers(config: TextConfig, layers: Sequence[LayerWeights]) -> StreamedLayers | None:
    """The layers of a model as such; None if the card or the model is another kind, or what compiles it is missing."""
    norm = layers[0].input_norm
    if not overlaps(norm) or len(layers) < 2 or sum(w.nbytes for w in matrices_of(layers[0])) < _LEAST_BYTES:
        return None
    form = Form.of(config, layers)
    if form is None:
        return None
    try:
        return StreamedLayers(form, config.rms_norm_eps, layers, norm.device)
    except (ImportError, OSError, RuntimeError):
        _log.warning("layers of one token run as several kernels each, which is slower", exc_info=True)
        return None


def _matrix(weight: Weight) -> _Matrix:
    if isinstance(weight, Tensor):
        return _Matrix(weight.data_ptr(), None, None)
    if isinstance(weight, Fp8Matrix):
        return _Matrix(weight.values.data_ptr(), weight.scale.data_ptr(), None)
    assert isinstance(weight, Int4Matrix)
    zeros = None if weight.zeros is None else weight.zeros.data_ptr()
    return _Matrix(weight.codes.data_ptr(), weight.scales.data_ptr(), zeros)
