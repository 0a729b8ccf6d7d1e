"""Reads Gemma-3 weights, plain or quantised, from safetensors files in Hugging Face layout.

What the config calls for and what the files hold must agree exactly, before anything is loaded. Tensors are read
straight to where they stay, so that the peak is the model, and a few matrices where such are repacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.config import Gemma3Config, VisionConfig
from wicore_backend.models.gemma3.tensor_files import REMEDY, TensorFiles
from wicore_backend.models.gemma3.tensor_names import HEAD, Shape, expected_shapes, may_be_quantized
from wicore_backend.models.gemma3.weight_format import weight_format
from wicore_backend.models.gemma3.weights import (
    Affine,
    Gemma3Weights,
    LayerEnd,
    LayerStart,
    LayerWeights,
    TextWeights,
    VisionLayerWeights,
    VisionWeights,
    Weight,
)
from wicore_backend.quantization.base import PLAIN_TYPES, QuantizedMatrix, Stored, WeightFormat

_AT_ONCE = 3
"""Parts of a model that are read at once: while one waits for its last bytes, or repacks them, the disk is busy."""

_T = TypeVar("_T")


def load_weights(
    directory: Path,
    config: Gemma3Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], object] = lambda _, __: None,
) -> Gemma3Weights:
    """The weights of the checkpoint in `directory`, norms in float32 and the rest in `dtype`, on `device`.

    Matrices that the checkpoint keeps quantised stay so, and are to be computed in `dtype`.

    Parameters
    ----------
    progress
        Called with the bytes read so far and the bytes there are, often.

    Raises
    ------
    CheckpointError
        If a file is missing or broken, or if its tensors are not those that `config` calls for.
    """
    with (
        CheckpointReader(directory, config, device=device, dtype=dtype, progress=progress) as reader,
        _readers(device) as begin,
    ):
        embedding = begin(reader.embedding)
        layers = [begin(partial(reader.layer, index)) for index in range(config.text.num_layers)]
        vision = begin(reader.vision) if config.vision else None
        there = embedding.result()
        text = TextWeights(there, tuple(layer.result() for layer in layers), reader.norm(), _head(reader, there))
        return Gemma3Weights(text, vision.result() if vision else None)


class _Begin(Protocol):
    """Has a part of a model read."""

    def __call__(self, read: Callable[[], _T], /) -> Future[_T]: ...


@contextmanager
def _readers(device: torch.device) -> Iterator[_Begin]:
    """Threads that read parts of a model to `device`, in the order of the current stream; after an error no more."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    follow = (lambda: None) if stream is None else partial(torch.cuda.set_stream, stream)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="load-weights", initializer=follow) as threads:
        try:
            yield threads.submit
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _head(reader: CheckpointReader, embedding: Tensor) -> Weight:
    """The head: `embedding` where the checkpoint has no other, or repeats it."""
    if not reader.has_head:
        return embedding
    head = reader.head()
    return embedding if isinstance(head, Tensor) and torch.equal(head, embedding) else head


class CheckpointReader(AbstractContextManager["CheckpointReader"]):
    """The checkpoint in `directory`, to be read part by part, each as `load_weights` gives it. A context.

    That the files hold what `config` calls for is checked before anything is read.

    Raises
    ------
    CheckpointError
        As `load_weights`, here and whenever something is read.
    """

    def __init__(
        self,
        directory: Path,
        config: Gemma3Config,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], object] = lambda _, __: None,
    ) -> None:
        self._config = config
        with ExitStack() as stack:
            tensors = TensorFiles(directory, stack, device, progress)
            quantized = _QuantizedModules(weight_format(directory), tensors)
            shapes = expected_shapes(config)
            self.has_head = tensors.hold_module(_module(HEAD))
            """Whether there is a head beside the embedding."""
            if config.text.tied_head and not self.has_head:
                del shapes[HEAD]
            tensors.check(quantized.expected(shapes))
            self._load = _Loader(tensors, quantized, device, dtype)
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def embedding(self) -> Tensor:
        return self._load.tensor("text.embed_tokens.weight")

    def layer(self, index: int) -> LayerWeights:
        start, end = self.layer_start(index), self.layer_end(index)
        return LayerWeights(
            input_norm=start.input_norm,
            qkv=start.qkv,
            qkv_bias=start.qkv_bias,
            qk_norm=start.qk_norm,
            out=end.out,
            out_bias=end.out_bias,
            post_attention_norm=end.post_attention_norm,
            pre_feedforward_norm=end.pre_feedforward_norm,
            gate_up=end.gate_up,
            down=end.down,
            post_feedforward_norm=end.post_feedforward_norm,
        )

    def layer_start(self, index: int) -> LayerStart:
        load, text, layer = self._load, self._config.text, f"text.layers.{index}"
        projections = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
        q_norm, k_norm = (load.norm(f"{layer}.self_attn.{name}_norm") for name in "qk")
        return LayerStart(
            input_norm=load.norm(f"{layer}.input_layernorm"),
            qkv=load.weight(*projections),
            qkv_bias=load.tensor(*(f"{p}.bias" for p in projections)) if text.attention_bias else None,
            qk_norm=torch.cat((q_norm.expand(text.num_heads, -1), k_norm.expand(text.num_kv_heads, -1))),
        )

    def layer_end(self, index: int) -> LayerEnd:
        load, layer = self._load, f"text.layers.{index}"
        return LayerEnd(
            out=load.weight(f"{layer}.self_attn.o_proj"),
            out_bias=load.tensor(f"{layer}.self_attn.o_proj.bias") if self._config.text.attention_bias else None,
            post_attention_norm=load.norm(f"{layer}.post_attention_layernorm"),
            pre_feedforward_norm=load.norm(f"{layer}.pre_feedforward_layernorm"),
            gate_up=load.weight(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
            down=load.weight(f"{layer}.mlp.down_proj"),
            post_feedforward_norm=load.norm(f"{layer}.post_feedforward_layernorm"),
        )

    def norm(self) -> Tensor:
        """Of what the last layer gives."""
        return self._load.norm("text.norm")

    def head(self) -> Weight:
        """The checkpoint's own head, or the embedding where it has none."""
        return self._load.weight(_module(HEAD)) if self.has_head else self.embedding()

    def vision(self) -> VisionWeights:
        assert self._config.vision is not None, "a text-only model has no vision weights"
        return _load_vision(self._load, self._config.vision)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


class _QuantizedModules:
    """Which linear modules of a checkpoint are quantised, and how.

    The files tell which they are, whatever config.json says that it ignored: those not stored as plain ones are.
    """

    def __init__(self, stored_as: WeightFormat | None, tensors: TensorFiles) -> None:
        self._format = stored_as
        self._tensors = tensors
        self._shapes: dict[str, Shape] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._shapes

    def expected(self, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
        """The tensors that a checkpoint must hold whose plain one would hold those of `shapes`."""
        expected = {}
        for name, shape in shapes.items():
            if self._format is None or not may_be_quantized(name) or self._is_plain(name):
                expected[name] = Stored((shape,), PLAIN_TYPES)
                continue
            module = _module(name)
            self._shapes[module] = shape
            expected |= {f"{module}.{part}": stored for part, stored in self._format.stored(shape).items()}
        return expected

    def matrix(self, module: str, *, dtype: torch.dtype) -> QuantizedMatrix:
        """The matrix of a module that is one of these."""
        assert self._format is not None
        shape = self._shapes[module]
        names = {part: f"{module}.{part}" for part in self._format.stored(shape)}
        tensors = {part: self._tensors.read(name) for part, name in names.items() if name in self._tensors}
        try:
            return self._format.matrix(tensors, shape, dtype=dtype)
        except ValueError as error:
            raise CheckpointError(f"{module} holds {error}; {REMEDY}") from None

    def _is_plain(self, name: str) -> bool:
        return name in self._tensors and self._tensors.type(name) in PLAIN_TYPES


class _Loader:
    """Copies checked tensors to the device, fused and in the type wanted."""

    def __init__(
        self, tensors: TensorFiles, quantized: _QuantizedModules, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._tensors = tensors
        self._quantized = quantized
        self._device = device
        self._dtype = dtype

    def tensor(self, *names: str) -> Tensor:
        """The tensors, in the model's type, stacked along their first axis."""
        rows, *rest = zip(*(self._tensors.shape(name) for name in names), strict=True)
        fused = torch.empty(sum(rows), *(sizes[0] for sizes in rest), device=self._device, dtype=self._dtype)
        for part, name in zip(torch.split(fused, list(rows)), names, strict=True):
            self._tensors.fill(part, name)
        return fused

    def weight(self, *modules: str) -> Weight:
        """The matrices of `modules`, stacked; plain ones if any of them is plain."""
        quantized = [module in self._quantized for module in modules]
        if not any(quantized):
            return self.tensor(*(f"{module}.weight" for module in modules))
        if not all(quantized):
            return torch.cat([self._plain(module) for module in modules])
        parts = [self._quantized.matrix(module, dtype=self._dtype) for module in modules]
        return parts[0] if len(parts) == 1 else type(parts[0]).stacked(parts)

    def _plain(self, module: str) -> Tensor:
        weight = self.weight(module)
        return weight if isinstance(weight, Tensor) else weight.dequantized()

    def affine(self, *modules: str) -> Affine:
        """Weights and biases of `modules`, each stacked."""
        return Affine(self.tensor(*(f"{m}.weight" for m in modules)), self.tensor(*(f"{m}.bias" for m in modules)))

    def norm(self, module: str) -> Tensor:
        """1 + weight of one of Gemma's norms, float32."""
        return 1.0 + self._tensors.read(f"{module}.weight").float()


def _load_vision(load: _Loader, config: VisionConfig) -> VisionWeights:
    patches = load.affine("vision.embeddings.patch_embedding")
    return VisionWeights(
        patches=Affine(patches.weight.flatten(1), patches.bias),
        positions=load.tensor("vision.embeddings.position_embedding.weight"),
        layers=tuple(_load_vision_layer(load, f"vision.encoder.layers.{i}") for i in range(config.num_layers)),
        norm=load.affine("vision.post_layernorm"),
        soft_token_norm=load.norm("projector.mm_soft_emb_norm"),
        projection=load.tensor("projector.mm_input_projection_weight").T.contiguous(),
    )


def _load_vision_layer(load: _Loader, layer: str) -> VisionLayerWeights:
    return VisionLayerWeights(
        norm1=load.affine(f"{layer}.layer_norm1"),
        qkv=load.affine(*(f"{layer}.self_attn.{name}_proj" for name in "qkv")),
        out=load.affine(f"{layer}.self_attn.out_proj"),
        norm2=load.affine(f"{layer}.layer_norm2"),
        up=load.affine(f"{layer}.mlp.fc1"),
        down=load.affine(f"{layer}.mlp.fc2"),
    )
