"""Small layers of one token as one kernel, compiled for a CPU, beside their plain twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scripts.random_gemma3 import _COMMON, random_weights
from tests import hopper_twin
from tests.accuracy import relative_error
from wicore_backend.executor.streamed_layer import HEADERS, MEASURED, SOURCE, Form, LayerCalls, Tuning
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import Weight, plain
from wicore_backend.quantization.fp8 import Fp8Matrix, quantized_fp8
from wicore_backend.quantization.int4_rounding import quantized_int4

CPU = torch.device("cpu")
QUANTIZE: Mapping[str, Callable[[Tensor], Weight]] = {
    "bf16": lambda matrix: matrix,
    "fp8": quantized_fp8,
    "int4": lambda matrix: quantized_int4(matrix, search=False),
    "int4 with zero points": lambda matrix: quantized_int4(matrix, symmetric=False, search=False),
}
_FEWEST_BLOCKS = 7
"""With which tiles of each matrix are two blocks'."""
MATRICES = ("qkv", "out", "gate_up", "down")
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 256,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 128,
}
TEXTS = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}


class SmallLayers:
    """A model's layers, what one token brings, the plain twin, and the kernel for so many blocks."""

    def __init__(
        self, directory: Path, kind: str, *, tuning: Tuning = MEASURED, texts: Mapping[str, str] = TEXTS
    ) -> None:
        (directory / "config.json").write_text(json.dumps(_COMMON | SHAPE))
        model = Gemma3Config.from_checkpoint(directory)
        weights = random_weights(model, device=CPU, dtype=torch.bfloat16, quantize=QUANTIZE[kind])
        self.text, self.layers = model.text, weights.text.layers
        form = Form.of(model.text, self.layers, tuning)
        assert form is not None, "the kernel is for such sizes"
        launch = None
        for self.blocks in range(_FEWEST_BLOCKS, 60, 2):  # Until a thread of each has at most one output of a matrix.
            self.form, self.shares = form, form.shares(self.blocks)
            launch = form.launch(self.shares, most_stages=3)
            if launch is not None:
                break
        assert launch is not None
        self.launch = launch
        defines = form.defines(launch)
        self.kernel = hopper_twin.HostKernel(SOURCE, texts, defines, parameter="Layer")
        widened = [
            replace(layer, **{n: plain(getattr(layer, n), torch.float32) for n in MATRICES}) for layer in self.layers
        ]
        twin = replace(weights.text, embedding=weights.text.embedding.float(), layers=tuple(widened))
        self.twin = TorchExecutor(model, replace(weights, text=replace(twin, head=twin.embedding)))
        torch.manual_seed(0)
        angles = torch.randn(1, model.text.head_dim // 2).repeat(1, 2)
        self.rope = angles.cos().bfloat16(), angles.sin().bfloat16()

    def row(self, scale: float = 1.0) -> list[Tensor]:
        """Of the residual stream, and what attention gives."""
        sizes = self.text.hidden_size, self.text.num_heads * self.text.head_dim
        return [torch.randn(1, size).mul_(scale).bfloat16() for size in sizes]

    def run(self, hidden: Tensor, attention: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Two layers one after the other, whose attention gives what the queries are: what each leaves."""
        calls = LayerCalls(self.form, self.text.rms_norm_eps, self.layers, self.shares)
        results = [calls.results(hidden), calls.results(hidden)]
        attended = self.text.num_heads * self.text.head_dim
        launches = [
            calls.given(0, hidden, attention, *self.rope, results[0]),
            calls.given(1, results[0][0], results[0][1][:, :attended], *self.rope, results[1]),
        ]
        mutable = {f"told_{name}": words for name, words in calls.told.items()} | {
            "launches": calls.launches,
            "counters": calls.counters,
            "fed_tiles": calls.fed_tiles,
        }
        for layer, (stream, heads) in enumerate(results):
            mutable |= {f"hidden_{layer}": stream, f"heads_{layer}": heads}
        constant = {"hidden": hidden, "attention": attention}
        constant |= dict(zip(("cos", "sin"), self.rope, strict=True)) | self.weights()
        for into in results:
            for result in into:
                result.fill_(float("nan"))
        self.kernel.run(
            launches,
            hopper_twin.Memory(constant, mutable),
            blocks=self.blocks,
            threads=self.launch.threads,
            shared_bytes=self.launch.shared_bytes,
            seed=seed,
        )
        return results

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            for name in layer.__slots__:
                value = getattr(layer, name)
                if isinstance(value, torch.Tensor):
                    parts = {"": value}
                elif isinstance(value, Fp8Matrix):
                    parts = {" values": value.values, " scales": value.scale}
                elif value is not None:
                    parts = {" codes": value.codes, " scales": value.scales, " zeros": value.zeros}
                else:
                    continue
                found |= {f"{name} of layer {number}{part}": t for part, t in parts.items() if t is not None}
        return found

    def errors(self, hidden: Tensor, attention: Tensor, results: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Relative, of the residual stream and the heads after each layer."""
        found = []
        rope = [table.float() for table in self.rope]
        for layer, (ours, our_heads) in enumerate(results):
            theirs, qkv = self.twin.mid(layer, hidden.float(), attention.float(), *rope)
            heads = torch.cat([part.flatten() for part in qkv])
            found += [relative_error(ours, theirs), relative_error(our_heads.flatten(), heads)]
            hidden, attention = ours, our_heads[:, : attention.shape[1]]
        return found
