"""What the tensors of a Gemma-3 checkpoint are called, and their shapes.

Three layouts name the same tensors: the old one (`language_model.model.`, `vision_tower.vision_model.`), that of
transformers 5 (`model.language_model.`, `model.vision_tower.`) and the text-only one (`model.`). All are mapped to one
set of canonical names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from wicore_backend.models.gemma3.config import Gemma3Config, TextConfig, VisionConfig

Shape = tuple[int, ...]

HEAD = "lm_head.weight"

_CANONICAL_PREFIXES = (
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "projector."),
    (re.compile(r"^(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.)"), "text."),
)

_LINEAR = re.compile(r"text\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


def canonical_name(key: str) -> str:
    """The name that stands for `key` of a file here; `key` itself if it has none of the layouts' prefixes."""
    for prefix, canonical in _CANONICAL_PREFIXES:
        if match := prefix.match(key):
            return canonical + key[match.end() :]
    return key


def may_be_quantized(name: str) -> bool:
    """Whether the tensor of this canonical name may be in fewer bits: one of the decoder's matrices, or the head."""
    return name == HEAD or _LINEAR.fullmatch(name) is not None


def expected_shapes(config: Gemma3Config) -> dict[str, Shape]:
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
    yield HEAD, (text.vocab_size, D)
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
