"""The decoder's segments as graphs. `TorchExecutor` is the plain twin.

Norms, RoPE, GELU and sums are computed in float32, since a library fuses them and keeps what it computes in registers
anyway; results are rounded where they are stored.

float16 ends at 65,504, and Gemma-3's activations do not. So in that precision the residual stream is float32, and the
inputs of the two products whose results a norm reads are scaled by 2^-6, which that norm takes out again if its epsilon
is scaled by 2^-12. Gate and up are computed at 2^-6 too; the gate is brought back in float32, where GELU is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wicore_backend.executor.segments.contract import Precision, SegmentSpec
from wicore_backend.executor.segments.graph import Graph, Scope, Value
from wicore_backend.executor.segments.matrices import product
from wicore_backend.models.gemma3.config import TextConfig
from wicore_backend.models.gemma3.weights import LayerEnd, LayerStart, Weight

_HALF_SCALE = 2.0**-6
"""In float16, of what reaches a norm: sums up to 4 million fit, and what is lost below 0.004 is nothing beside them."""


def product_scale(precision: Precision) -> float:
    """What the inputs of products that may be too large for the precision's type are multiplied by."""
    return _HALF_SCALE if precision is Precision.FP16 else 1.0


class DecoderGraphs:
    """Writes segments of a decoder in one precision."""

    def __init__(self, config: TextConfig, precision: Precision) -> None:
        self._config = config
        self._activations = precision.activations
        self._residual = precision.residual
        self._scale = product_scale(precision)

    def first(self, graph: Graph, spec: SegmentSpec, start: LayerStart, *, name: str) -> None:
        """Layer 0 up to its attention; its nodes are called `name` and so on."""
        hidden, cos, sin = (graph.input(tensor) for tensor in spec.inputs)
        self._give(graph, spec, self._before_attention(Scope(graph, name), start, hidden, cos, sin))

    def mid(self, graph: Graph, spec: SegmentSpec, end: LayerEnd, start: LayerStart, *, names: tuple[str, str]) -> None:
        """One layer from its attention on, and the next up to its."""
        hidden, attention, cos, sin = (graph.input(tensor) for tensor in spec.inputs)
        hidden = self._after_attention(Scope(graph, names[0]), end, hidden, attention)
        self._give(graph, spec, (hidden, *self._before_attention(Scope(graph, names[1]), start, hidden, cos, sin)))

    def last(self, graph: Graph, spec: SegmentSpec, end: LayerEnd, norm: Tensor, head: Weight, *, name: str) -> None:
        """The last layer from its attention on, for some rows, and their logits."""
        text = Scope(graph, "text")
        hidden, attention, rows = (graph.input(tensor) for tensor in spec.inputs)
        hidden = text("Gather", hidden, rows, name="hidden_rows", axis=0)
        attention = text("Gather", attention, rows, name="attention_rows", axis=0)
        hidden = self._after_attention(Scope(graph, name), end, hidden, attention)
        normed = self._norm(text, "norm", hidden, norm)
        logits = text.wide(product(text, "head", normed, head, activations=self._activations))
        if cap := self._config.final_logit_softcapping:
            bound = graph.number(cap, torch.float32)
            logits = text("Tanh", text("Div", logits, bound, name="cap.ratio"), name="cap.tanh")
            logits = text("Mul", logits, bound, name="capped")
        self._give(graph, spec, (logits,))

    def _give(self, graph: Graph, spec: SegmentSpec, values: tuple[Value, ...]) -> None:
        for value, tensor in zip(values, spec.outputs, strict=True):
            graph.output(value, tensor)

    def _before_attention(
        self, at: Scope, weights: LayerStart, hidden: Value, cos: Value, sin: Value
    ) -> tuple[Value, Value, Value]:
        text, graph = self._config, at.graph
        normed = self._norm(at, "input_norm", hidden, weights.input_norm)
        qkv = product(at, "qkv", normed, weights.qkv, activations=self._activations)
        if weights.qkv_bias is not None:
            qkv = at("Add", at.wide(qkv), at.wide(at.weight("qkv.bias", weights.qkv_bias)), name="qkv.biased")
        heads = at.reshape(qkv, -1, text.qkv_heads, text.head_dim, name="heads")
        qk, v = at.split(heads, [text.qk_heads, text.num_kv_heads], ["qk", "v"], axis=1)
        ones = graph.constant(torch.ones(text.head_dim), name="ones")
        direction = at("RMSNormalization", at.wide(qk), ones, name="qk.unit", axis=-1, epsilon=text.rms_norm_eps)
        qk = at("Mul", direction, at.weight("qk_norm", weights.qk_norm), name="qk.normed")
        qk = graph.cast(self._rotate(at, qk, cos, sin), self._activations)
        q, k = at.split(qk, [text.num_heads, text.num_kv_heads], ["q", "k"], axis=1)
        return q, k, v

    def _after_attention(self, at: Scope, weights: LayerEnd, hidden: Value, attention: Value) -> Value:
        activations, scale = self._activations, self._scale
        attention = at.scaled(attention, scale, name="attention.scaled")
        out = at.wide(product(at, "out", attention, weights.out, activations=activations))
        if weights.out_bias is not None:
            bias = at.scaled(at.wide(at.weight("out.bias", weights.out_bias)), scale, name="out.bias.scaled")
            out = at("Add", out, bias, name="out.biased")
        hidden = self._add_normed(at, "attention", hidden, out, weights.post_attention_norm)

        normed = self._norm(at, "pre_feedforward_norm", hidden, weights.pre_feedforward_norm)
        normed = at.scaled(normed, scale, name="pre_feedforward_norm.scaled")
        gate_up = product(at, "gate_up", normed, weights.gate_up, activations=activations)
        gate, up = at.split(gate_up, [self._config.intermediate_size] * 2, ["gate", "up"], axis=1)
        gate = at.scaled(at.wide(gate), 1 / scale, name="gate.unscaled")
        fed = at("Mul", at("Gelu", gate, name="gelu", approximate="tanh"), at.wide(up), name="gated")
        down = at.wide(product(at, "down", fed, weights.down, activations=activations))
        return self._add_normed(at, "feedforward", hidden, down, weights.post_feedforward_norm)

    def _add_normed(self, at: Scope, part: str, hidden: Value, result: Value, norm: Tensor) -> Value:
        """The residual stream, and on top of it the norm of a part's scaled result."""
        normed = self._norm(at, f"post_{part}_norm", result, norm, eps=self._config.rms_norm_eps * self._scale**2)
        return at.graph.cast(at("Add", at.wide(hidden), normed, name=f"after_{part}"), self._residual)

    def _norm(self, at: Scope, name: str, x: Value, weight: Tensor, *, eps: float | None = None) -> Value:
        """RMSNorm of `x` over its last axis, float32."""
        epsilon = self._config.rms_norm_eps if eps is None else eps
        scale = at.weight(name, weight)
        return at("RMSNormalization", at.wide(x), scale, name=f"{name}.normed", axis=-1, epsilon=epsilon)

    def _rotate(self, at: Scope, x: Value, cos: Value, sin: Value) -> Value:
        """RoPE of `x` float32 [T, heads, d], whose two halves are the planes' two axes."""
        half, one = self._config.head_dim // 2, at.graph.integers(1)
        cos, sin = (at("Unsqueeze", at.wide(of), one, name=f"{of.name}.of_heads") for of in (cos, sin))
        left, right = at.split(x, [half, half], ["qk.left", "qk.right"], axis=2)
        turned = at("Concat", at("Neg", right, name="qk.negated"), left, name="qk.turned", axis=-1)
        along, across = at("Mul", x, cos, name="qk.cos"), at("Mul", turned, sin, name="qk.sin")
        return at("Add", along, across, name="qk.rotated")
