"""Reads Gemma-3 weights from safetensors files in Hugging Face layout.

Three layouts name the same tensors: the old one (`language_model.model.`, `vision_tower.vision_model.`), that of
transformers 5 (`model.language_model.`, `model.vision_tower.`) and the text-only one (`model.`). All are mapped to one
set of canonical names; what the config calls for and what the files hold must then agree exactly, before anything is
loaded. Tensors are read one by one, straight to where they stay, so that the peak is the model and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.config import Gemma3Config, TextConfig, VisionConfig
from wicore_backend.models.gemma3.weights import (
    Affine,
    Gemma3Weights,
    LayerWeights,
    TextWeights,
    VisionLayerWeights,
    VisionWeights,
)
from wicore_backend.processor.checkpoint_files import read_json

Shape = tuple[int, ...]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_REMEDY = "download the checkpoint again, or point the model setting at a complete one"
_DTYPES = ("F32", "BF16", "F16")
_HEAD = "lm_head.weight"

_CANONICAL_PREFIXES = (
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "projector."),
    (re.compile(r"^(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.)"), "text."),
)


def load_weights(directory: Path, config: Gemma3Config, *, device: torch.device, dtype: torch.dtype) -> Gemma3Weights:
    """The weights of the checkpoint in `directory`, norms in float32 and the rest in `dtype`, on `device`.

    Raises
    ------
    CheckpointError
        If a file is missing or broken, or if its tensors are not those that `config` calls for.
    """
    with ExitStack() as stack:
        tensors = _TensorFiles(directory, stack)
        expected = _expected_shapes(config)
        if config.text.tied_head and _HEAD not in tensors:
            del expected[_HEAD]
        tensors.check(expected)
        loader = _Loader(tensors, device, dtype)
        return Gemma3Weights(
            text=_load_text(loader, config.text),
            vision=_load_vision(loader, config.vision) if config.vision else None,
        )


class _TensorFiles:
    """The tensors of a checkpoint's open files, under canonical names."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._sources: dict[str, tuple[Any, str]] = {}
        for name in _file_names(directory):
            path = directory / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}; {_REMEDY}") from None
            for key in keys:
                canonical = _canonical_name(key)
                if canonical in self._sources:
                    raise CheckpointError(f"{directory} holds {key} twice, in {name} and under another name or file")
                self._sources[canonical] = (file, key)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def check(self, expected: Mapping[str, Shape]) -> None:
        """CheckpointError unless the tensors' names and shapes are exactly those `expected`, their types known."""
        self._refuse("lacks", expected.keys() - self._sources.keys(), _REMEDY)
        extra = [self._sources[name][1] for name in self._sources.keys() - expected.keys()]
        self._refuse("holds beside what config.json calls for", extra, "does config.json belong to these weights?")
        shapes, types = [], []
        for name, shape in expected.items():
            file, key = self._sources[name]
            stored = file.get_slice(key)
            if tuple(stored.get_shape()) != shape:
                shapes.append(f"{key} {stored.get_shape()} in place of {list(shape)}")
            if stored.get_dtype() not in _DTYPES:
                types.append(f"{key} {stored.get_dtype()} in place of {' or '.join(_DTYPES)}")
        self._refuse("holds in other shapes than config.json says", shapes, "does config.json belong to these weights?")
        self._refuse("holds in an unknown type", types, "quantised checkpoints are not read")

    def shape(self, name: str) -> Shape:
        file, key = self._sources[name]
        return tuple(file.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU."""
        file, key = self._sources[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def _refuse(self, what: str, names: Iterable[str], remedy: str) -> None:
        if names := sorted(names):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"{self._directory} {what}: {shown}; {remedy}")


def _file_names(directory: Path) -> list[str]:
    """The safetensors files that make up the checkpoint."""
    if not (directory / _INDEX).exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}; {_REMEDY}")
        return [_SINGLE]
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / _INDEX} has no weight_map; {_REMEDY}")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{directory / _INDEX} names {outside[0]!r}; shards lie beside the index")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        shown = ", ".join(missing[:5])
        raise CheckpointError(f"{directory} lacks {len(missing)} of the shards its index names: {shown}; {_REMEDY}")
    return names


def _canonical_name(key: str) -> str:
    for prefix, canonical in _CANONICAL_PREFIXES:
        if match := prefix.match(key):
            return canonical + key[match.end() :]
    return key


def _expected_shapes(config: Gemma3Config) -> dict[str, Shape]:
    """Canonical name and shape of every tensor that the config calls for, a head of its own included."""
    text = config.text
    shapes = dict(_text_shapes(text))
    if vision := config.vision:
        shapes |= _vision_shapes(vision)
        shapes["projector.mm_soft_emb_norm.weight"] = (vision.hidden_size,)
        shapes["projector.mm_input_projection_weight"] = (vision.hidden_size, text.hidden_size)
    return shapes


def _text_shapes(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    D, F = text.hidden_size, text.intermediate_size
    heads = {"q": text.num_heads, "k": text.num_kv_heads, "v": text.num_kv_heads}
    yield _HEAD, (text.vocab_size, D)
    yield "text.embed_tokens.weight", (text.vocab_size, D)
    yield "text.norm.weight", (D,)
    for i in range(text.num_layers):
        layer = f"text.layers.{i}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{layer}.{norm}_layernorm.weight", (D,)
        for name, count in heads.items():
            yield f"{layer}.self_attn.{name}_proj.weight", (count * text.head_dim, D)
            if text.attention_bias:
                yield f"{layer}.self_attn.{name}_proj.bias", (count * text.head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (D, text.num_heads * text.head_dim)
        if text.attention_bias:
            yield f"{layer}.self_attn.o_proj.bias", (D,)
        for name in ("q", "k"):
            yield f"{layer}.self_attn.{name}_norm.weight", (text.head_dim,)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (F, D)
        yield f"{layer}.mlp.down_proj.weight", (D, F)


def _vision_shapes(vision: VisionConfig) -> dict[str, Shape]:
    D, F = vision.hidden_size, vision.intermediate_size
    shapes: dict[str, Shape] = {
        "vision.embeddings.patch_embedding.weight": (D, vision.num_channels, vision.patch_size, vision.patch_size),
        "vision.embeddings.patch_embedding.bias": (D,),
        "vision.embeddings.position_embedding.weight": (vision.patches_per_side**2, D),
        "vision.post_layernorm.weight": (D,),
        "vision.post_layernorm.bias": (D,),
    }
    linears = {f"self_attn.{name}": (D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": (F, D), "mlp.fc2": (D, F)}
    for i in range(vision.num_layers):
        layer = f"vision.encoder.layers.{i}"
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{norm}.weight"] = (D,)
            shapes[f"{layer}.{norm}.bias"] = (D,)
    if vision.vision_use_head:
        shapes |= _pooling_head_shapes(vision)
    return shapes


def _pooling_head_shapes(vision: VisionConfig) -> dict[str, Shape]:
    """SigLIP's pooling head: present in some checkpoints, never loaded."""
    D, F = vision.hidden_size, vision.intermediate_size
    return {
        "vision.head.probe": (1, 1, D),
        "vision.head.attention.in_proj_weight": (3 * D, D),
        "vision.head.attention.in_proj_bias": (3 * D,),
        "vision.head.attention.out_proj.weight": (D, D),
        "vision.head.attention.out_proj.bias": (D,),
        "vision.head.layernorm.weight": (D,),
        "vision.head.layernorm.bias": (D,),
        "vision.head.mlp.fc1.weight": (F, D),
        "vision.head.mlp.fc1.bias": (F,),
        "vision.head.mlp.fc2.weight": (D, F),
        "vision.head.mlp.fc2.bias": (D,),
    }


class _Loader:
    """Copies checked tensors to the device, fused and in the type wanted."""

    def __init__(self, tensors: _TensorFiles, device: torch.device, dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype

    def tensor(self, *names: str) -> Tensor:
        """The tensors, in the model's type, stacked along their first axis."""
        rows, *rest = zip(*(self._tensors.shape(name) for name in names), strict=True)
        fused = torch.empty(sum(rows), *(sizes[0] for sizes in rest), device=self._device, dtype=self._dtype)
        for part, name in zip(torch.split(fused, list(rows)), names, strict=True):
            part.copy_(self._tensors.read(name))
        return fused

    def affine(self, *modules: str) -> Affine:
        """Weights and biases of `modules`, each stacked."""
        return Affine(self.tensor(*(f"{m}.weight" for m in modules)), self.tensor(*(f"{m}.bias" for m in modules)))

    def norm(self, module: str) -> Tensor:
        """1 + weight of one of Gemma's norms, float32."""
        return 1.0 + self._tensors.read(f"{module}.weight").to(self._device, torch.float32)

    def head(self, embedding: Tensor) -> Tensor:
        """The head: `embedding` where the checkpoint has no other, or repeats it."""
        if _HEAD not in self._tensors:
            return embedding
        head = self.tensor(_HEAD)
        return embedding if torch.equal(head, embedding) else head


def _load_text(load: _Loader, config: TextConfig) -> TextWeights:
    embedding = load.tensor("text.embed_tokens.weight")
    return TextWeights(
        embedding=embedding,
        layers=tuple(_load_layer(load, config, f"text.layers.{i}") for i in range(config.num_layers)),
        norm=load.norm("text.norm"),
        head=load.head(embedding),
    )


def _load_layer(load: _Loader, config: TextConfig, layer: str) -> LayerWeights:
    attention = f"{layer}.self_attn"
    projections = tuple(f"{attention}.{name}_proj" for name in "qkv")
    q_norm, k_norm = load.norm(f"{attention}.q_norm"), load.norm(f"{attention}.k_norm")
    return LayerWeights(
        input_norm=load.norm(f"{layer}.input_layernorm"),
        qkv=load.tensor(*(f"{p}.weight" for p in projections)),
        qkv_bias=load.tensor(*(f"{p}.bias" for p in projections)) if config.attention_bias else None,
        qk_norm=torch.cat((q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1))),
        out=load.tensor(f"{attention}.o_proj.weight"),
        out_bias=load.tensor(f"{attention}.o_proj.bias") if config.attention_bias else None,
        post_attention_norm=load.norm(f"{layer}.post_attention_layernorm"),
        pre_feedforward_norm=load.norm(f"{layer}.pre_feedforward_layernorm"),
        gate_up=load.tensor(f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
        down=load.tensor(f"{layer}.mlp.down_proj.weight"),
        post_feedforward_norm=load.norm(f"{layer}.post_feedforward_layernorm"),
    )


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
