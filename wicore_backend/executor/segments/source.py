"""Where a model's weights come from, part by part: a checkpoint of any size, weights in memory, or shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from wicore_backend.models.gemma3.checkpoint import CheckpointReader
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.models.gemma3.weight_format import weight_format
from wicore_backend.models.gemma3.weights import (
    Affine,
    Gemma3Weights,
    LayerEnd,
    LayerStart,
    VisionLayerWeights,
    VisionWeights,
    Weight,
)

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


class Parts(Protocol):
    """What segments are made of. A call may read gigabytes; who asks keeps the result no longer than needed."""

    def layer_start(self, index: int, /) -> LayerStart: ...

    def layer_end(self, index: int, /) -> LayerEnd: ...

    def norm(self) -> Tensor:
        """Of what the last layer gives, float32 [D]."""

    def head(self) -> Weight:
        """[V, D]"""

    def vision(self) -> VisionWeights: ...


class WeightSource(AbstractContextManager["WeightSource"]):
    """One model's weights, which are read when they are asked for. One thread at a time may use it.

    Parameters
    ----------
    fingerprint
        Of the weights, in hexadecimal digits.
    quantized
        Whether some matrices come quantised.
    parts
        Gives the parts in a type.
    """

    def __init__(
        self, config: Gemma3Config, *, fingerprint: str, quantized: bool, parts: Callable[[torch.dtype], Parts]
    ) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self.quantized = quantized
        self._make_parts = parts
        self._parts: dict[torch.dtype, Parts] = {}
        self._told: set[str] = set()
        self._stack = ExitStack()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The checkpoint in `directory`, plain or quantised.

        Raises
        ------
        CheckpointError
            If it is none, or incomplete; what its files hold is looked at when parts are asked for.
        """
        config = Gemma3Config.from_checkpoint(directory)
        stack = ExitStack()

        def parts(dtype: torch.dtype) -> Parts:
            return stack.enter_context(CheckpointReader(directory, config, device=_CPU, dtype=dtype))

        source = cls(
            config,
            fingerprint=checkpoint_fingerprint(directory).hex(),
            quantized=weight_format(directory) is not None,
            parts=parts,
        )
        source._stack = stack
        return source

    def parts(self, dtype: torch.dtype) -> Parts:
        """The model's parts, norms in float32 and the rest in `dtype`; quantised matrices to be computed in it."""
        if dtype not in self._parts:
            self._parts[dtype] = self._make_parts(dtype)
        return self._parts[dtype]

    def tell_once(self, message: str) -> None:
        """A warning that holds for many of the model's parts."""
        if message not in self._told:
            self._told.add(message)
            _log.warning("%s", message)

    def close(self) -> None:
        """Close the files; parts that were read stay."""
        self._parts.clear()
        self._stack.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryParts:
    """`Parts` of weights that are in memory, on any device: the very tensors."""

    def __init__(self, weights: Gemma3Weights) -> None:
        self._weights = weights

    def layer_start(self, index: int) -> LayerStart:
        return self._weights.text.layers[index].start

    def layer_end(self, index: int) -> LayerEnd:
        return self._weights.text.layers[index].end

    def norm(self) -> Tensor:
        return self._weights.text.norm

    def head(self) -> Weight:
        return self._weights.text.head

    def vision(self) -> VisionWeights:
        assert self._weights.vision is not None, "a text-only model has no vision weights"
        return self._weights.vision


class ShapeParts:
    """`Parts` of a model as its config describes it, without values: on the `meta` device, matrices in `dtype`."""

    def __init__(self, config: Gemma3Config, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype

    def layer_start(self, _index: int, /) -> LayerStart:
        text = self._config.text
        width = text.qkv_heads * text.head_dim
        return LayerStart(
            input_norm=self.norm(),
            qkv=self._tensor(width, text.hidden_size),
            qkv_bias=self._tensor(width) if text.attention_bias else None,
            qk_norm=self._tensor(text.qk_heads, text.head_dim, dtype=torch.float32),
        )

    def layer_end(self, _index: int, /) -> LayerEnd:
        text = self._config.text
        return LayerEnd(
            out=self._tensor(text.hidden_size, text.num_heads * text.head_dim),
            out_bias=self._tensor(text.hidden_size) if text.attention_bias else None,
            post_attention_norm=self.norm(),
            pre_feedforward_norm=self.norm(),
            gate_up=self._tensor(2 * text.intermediate_size, text.hidden_size),
            down=self._tensor(text.hidden_size, text.intermediate_size),
            post_feedforward_norm=self.norm(),
        )

    def norm(self) -> Tensor:
        return self._tensor(self._config.text.hidden_size, dtype=torch.float32)

    def head(self) -> Weight:
        return self._tensor(self._config.text.vocab_size, self._config.text.hidden_size)

    def vision(self) -> VisionWeights:
        vision = self._config.vision
        assert vision is not None, "a text-only model has no vision weights"
        width, wide = vision.hidden_size, vision.intermediate_size
        norm = Affine(self._tensor(width), self._tensor(width))
        layer = VisionLayerWeights(
            norm1=norm,
            qkv=self._affine(3 * width, width),
            out=self._affine(width, width),
            norm2=norm,
            up=self._affine(wide, width),
            down=self._affine(width, wide),
        )
        return VisionWeights(
            patches=self._affine(width, vision.num_channels * vision.patch_size**2),
            positions=self._tensor(vision.patches_per_side**2, width),
            layers=(layer,) * vision.num_layers,
            norm=norm,
            soft_token_norm=self._tensor(width, dtype=torch.float32),
            projection=self._tensor(self._config.text.hidden_size, width),
        )

    def _affine(self, rows: int, columns: int) -> Affine:
        return Affine(self._tensor(rows, columns), self._tensor(rows))

    def _tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._dtype, device="meta")
