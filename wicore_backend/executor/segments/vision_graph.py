"""The vision tower and its projector as a graph. `encode_images` (models/gemma3/vision.py) is the plain twin.

Patches of all pictures are the rows of one matrix; only attention sees which picture they are of. Norms, sums and GELU
are computed in float32. In float16 the residual stream is float32, and products that are added to it are computed at
2^-6, as the decoder's are.
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from wicore_backend.executor.segments.contract import Precision, SegmentSpec
from wicore_backend.executor.segments.decoder_graphs import product_scale
from wicore_backend.executor.segments.graph import Graph, Scope, Value
from wicore_backend.models.gemma3.config import Gemma3Config, VisionConfig
from wicore_backend.models.gemma3.weights import Affine, VisionLayerWeights, VisionWeights


class VisionGraph:
    """Writes the vision segment of a model that sees, in one precision."""

    def __init__(self, config: Gemma3Config, precision: Precision) -> None:
        assert config.vision is not None, "a text-only model has no vision segment"
        self._vision: VisionConfig = config.vision
        self._tokens_per_side = isqrt(config.mm_tokens_per_image)
        self._activations = precision.activations
        self._residual = precision.residual
        self._scale = product_scale(precision)

    def write(self, graph: Graph, spec: SegmentSpec, weights: VisionWeights) -> None:
        at, (pixels,), (soft_tokens,) = Scope(graph, "vision"), spec.inputs, spec.outputs
        hidden = self._patches(at, graph.input(pixels), weights)
        for index, layer in enumerate(weights.layers):
            hidden = self._layer(Scope(graph, f"vision.layer.{index}"), hidden, layer)
        hidden = self._pooled(at, self._norm(at, "norm", hidden, weights.norm))
        norm = at.weight("soft_token_norm", weights.soft_token_norm)
        eps = self._vision.layer_norm_eps
        normed = at("RMSNormalization", hidden, norm, name="soft_token_norm.normed", axis=-1, epsilon=eps)
        projected = self._projected(at, normed, weights.projection)
        _, count, width = soft_tokens.shape
        assert isinstance(count, int)
        assert isinstance(width, int)
        graph.output(at.reshape(projected, -1, count, width, name="by_picture"), soft_tokens)

    def _patches(self, at: Scope, pixels: Value, weights: VisionWeights) -> Value:
        """Embedded patches [N P, D], those of a picture row by row."""
        vision = self._vision
        side, size, channels = vision.patches_per_side, vision.patch_size, vision.num_channels
        grid = at.reshape(pixels, -1, channels, side, size, side, size, name="pixels.grid")
        by_patch = at("Transpose", grid, name="pixels.by_patch", perm=[0, 2, 4, 1, 3, 5])
        rows = at.reshape(by_patch, -1, channels * size * size, name="patches.pixels")
        patches = at.wide(self._affine(at, "patches", rows, weights.patches))
        patches = at.reshape(patches, -1, side * side, vision.hidden_size, name="patches.by_picture")
        positions = at.wide(at.weight("positions", weights.positions))
        return self._rows(at, at("Add", patches, positions, name="placed"))

    def _layer(self, at: Scope, hidden: Value, layer: VisionLayerWeights) -> Value:
        attended = self._attention(at, self._norm(at, "norm1", hidden, layer.norm1), layer)
        hidden = self._add(at, "after_attention", hidden, attended)
        up = self._affine(at, "up", self._norm(at, "norm2", hidden, layer.norm2), layer.up)
        wide = at("Gelu", at.wide(up), name="gelu", approximate="tanh")
        return self._add(at, "after_feedforward", hidden, self._summand(at, "down", wide, layer.down))

    def _attention(self, at: Scope, normed: Value, layer: VisionLayerWeights) -> Value:
        """Every patch attends to every patch of its picture."""
        vision = self._vision
        patches, width = vision.patches_per_side**2, vision.hidden_size
        head_dim = width // vision.num_heads
        qkv = self._affine(at, "qkv", normed, layer.qkv)
        heads = [
            at(
                "Transpose",
                at.reshape(part, -1, patches, vision.num_heads, head_dim, name=f"{name}.by_head"),
                name=f"{name}.heads",
                perm=[0, 2, 1, 3],
            )
            for name, part in zip("qkv", at.split(qkv, [width] * 3, ["q", "k", "v"], axis=1), strict=True)
        ]
        attended = at("Attention", *heads, name="attention", scale=head_dim**-0.5)
        by_patch = at("Transpose", attended, name="attention.by_patch", perm=[0, 2, 1, 3])
        return self._summand(at, "out", at.reshape(by_patch, -1, width, name="attention.rows"), layer.out)

    def _pooled(self, at: Scope, hidden: Value) -> Value:
        """Means of squares of patches, float32 [N M, D]."""
        vision, side = self._vision, self._tokens_per_side
        square, width = vision.patches_per_side // side, vision.hidden_size
        grid = at.reshape(hidden, -1, side, square, side, square, width, name="pool.grid")
        means = at("ReduceMean", grid, at.graph.integers(2, 4), name="pool.means", keepdims=0)
        return at.reshape(means, -1, width, name="pool.rows")

    def _projected(self, at: Scope, normed: Value, projection: Tensor) -> Value:
        matrix = at.weight("projection.weight", projection)
        return at("Gemm", at.graph.cast(normed, self._activations), matrix, name="projection", transB=1)

    def _affine(self, at: Scope, name: str, x: Value, affine: Affine) -> Value:
        weight, bias = at.weight(f"{name}.weight", affine.weight), at.weight(f"{name}.bias", affine.bias)
        return at("Gemm", at.graph.cast(x, self._activations), weight, bias, name=name, transB=1)

    def _summand(self, at: Scope, name: str, x: Value, affine: Affine) -> Value:
        """What is added to the residual stream, and need not fit float16."""
        if self._scale == 1:
            return self._affine(at, name, x, affine)
        x = at.graph.cast(at.scaled(x, self._scale, name=f"{name}.scaled"), self._activations)
        scaled = at.wide(at("Gemm", x, at.weight(f"{name}.weight", affine.weight), name=name, transB=1))
        product = at.scaled(scaled, 1 / self._scale, name=f"{name}.unscaled")
        return at("Add", product, at.wide(at.weight(f"{name}.bias", affine.bias)), name=f"{name}.biased")

    def _norm(self, at: Scope, name: str, x: Value, norm: Affine) -> Value:
        weight = at.wide(at.weight(f"{name}.weight", norm.weight))
        bias = at.wide(at.weight(f"{name}.bias", norm.bias))
        eps = self._vision.layer_norm_eps
        return at("LayerNormalization", at.wide(x), weight, bias, name=f"{name}.normed", axis=-1, epsilon=eps)

    def _add(self, at: Scope, name: str, hidden: Value, result: Value) -> Value:
        total = at("Add", at.wide(hidden), at.wide(result), name=name)
        return at.graph.cast(total, self._residual)

    def _rows(self, at: Scope, hidden: Value) -> Value:
        rows = at.reshape(hidden, -1, self._vision.hidden_size, name="rows")
        return at.graph.cast(rows, self._residual)
