"""What a Gemma-3 checkpoint's own files say about the model: `config.json` and `generation_config.json`.

Read as transformers reads them: both the names of version 4 (`rope_theta`, `rope_scaling`, `sliding_window_pattern`)
and of version 5 (`rope_parameters`, `layer_types`), and its defaults where a key is missing, as most are in the files
that Google publishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Self

from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config_fields import ConfigFields
from wicore_backend.processor.checkpoint_files import read_json, read_json_if_present

_LAYER_TYPES = {LayerGroup.GLOBAL: "full_attention", LayerGroup.LOCAL: "sliding_attention"}
_MOST_LAYERS = 1024
"""Names are made for each layer's weights before they are looked for; Gemma-3's largest model has 62."""
_DEFAULT_THETA = {LayerGroup.GLOBAL: 1_000_000.0, LayerGroup.LOCAL: 10_000.0}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one layer group: base `theta`, positions divided by `factor` (linear scaling)."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder. Sizes are in elements, `window` in tokens, the token's own included."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    layer_groups: tuple[LayerGroup, ...]
    rope: Mapping[LayerGroup, Rope]
    rms_norm_eps: float
    attention_scale: float
    """Factor of the attention scores, `query_pre_attn_scalar ** -0.5`."""
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    max_position_embeddings: int
    hidden_activation: str
    attention_bias: bool
    tied_head: bool
    """Whether the head is the embedding when the checkpoint brings no head of its own."""

    @property
    def qk_heads(self) -> int:
        """Query and key heads together: those that are normalised and rotated."""
        return self.num_heads + self.num_kv_heads

    @property
    def qkv_heads(self) -> int:
        """Query, key and value heads together."""
        return self.num_heads + 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP tower. `image_size` and `patch_size` are in pixels, of squares."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    vision_use_head: bool
    """Whether the checkpoint holds SigLIP's pooling head, which Gemma-3 does not use."""

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class Gemma3Config:
    """One Gemma-3 model. `vision` is None for a text-only one (`gemma3_text`)."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int
    boi_token_id: int
    eoi_token_id: int
    mm_tokens_per_image: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Self:
        """The configuration of the checkpoint in `directory`.

        Raises
        ------
        CheckpointError
            If a file is missing or broken, or asks for something that is not implemented; names file, key, value and
            the values allowed.
        """
        path = directory / "config.json"
        top = ConfigFields(path, read_json(path))
        model_type = top.choice("model_type", ("gemma3", "gemma3_text"))
        text_fields = top if model_type == "gemma3_text" else top.section("text_config")
        text_fields.choice("model_type", ("gemma3_text",), default="gemma3_text")
        tokens_per_image = top.integer("mm_tokens_per_image", default=256)
        generation_path = directory / "generation_config.json"
        generation = ConfigFields(generation_path, read_json_if_present(generation_path))
        return cls(
            text=_text(text_fields, tied_head=top.boolean("tie_word_embeddings", default=True)),
            vision=None if model_type == "gemma3_text" else _vision(top.section("vision_config"), tokens_per_image),
            image_token_id=_token(top, "image_token", default=262_144),
            boi_token_id=_token(top, "boi_token", default=255_999),
            eoi_token_id=_token(top, "eoi_token", default=256_000),
            mm_tokens_per_image=tokens_per_image,
            eos_token_ids=_eos_token_ids(generation, top, text_fields),
            pad_token_id=(top if "pad_token_id" in top else text_fields).integer("pad_token_id", default=0, minimum=0),
        )


def _text(fields: ConfigFields, *, tied_head: bool) -> TextConfig:
    num_layers = fields.integer("num_hidden_layers", default=26, maximum=_MOST_LAYERS)
    num_heads = fields.integer("num_attention_heads", default=8)
    num_kv_heads = fields.integer("num_key_value_heads", default=4)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {num_heads}")
    head_dim = fields.integer("head_dim", default=256)
    if head_dim % 2:
        raise fields.error("head_dim", "even, since RoPE rotates its two halves")
    if fields.boolean("use_bidirectional_attention", default=False):
        raise fields.error("use_bidirectional_attention", "false: this engine generates, it does not embed")
    return TextConfig(
        vocab_size=fields.integer("vocab_size", default=262_208),
        hidden_size=fields.integer("hidden_size", default=2304),
        intermediate_size=fields.integer("intermediate_size", default=9216),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        window=fields.integer("sliding_window", default=4096),
        layer_groups=_layer_groups(fields, num_layers),
        rope=_ropes(fields),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        attention_scale=fields.positive("query_pre_attn_scalar", default=256) ** -0.5,
        attn_logit_softcapping=fields.optional_positive("attn_logit_softcapping"),
        final_logit_softcapping=fields.optional_positive("final_logit_softcapping"),
        max_position_embeddings=fields.integer("max_position_embeddings", default=131_072),
        hidden_activation=fields.choice("hidden_activation", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh"),
        attention_bias=fields.boolean("attention_bias", default=False),
        tied_head=tied_head,
    )


def _layer_groups(fields: ConfigFields, num_layers: int) -> tuple[LayerGroup, ...]:
    groups = {name: group for group, name in _LAYER_TYPES.items()}
    if "layer_types" in fields:
        types = fields.choices("layer_types", tuple(groups))
        if len(types) != num_layers:
            raise fields.error("layer_types", f"a list of num_hidden_layers = {num_layers} entries")
        return tuple(groups[name] for name in types)
    pattern = fields.integer("sliding_window_pattern", default=6)
    return tuple(LayerGroup.LOCAL if (i + 1) % pattern else LayerGroup.GLOBAL for i in range(num_layers))


def _ropes(fields: ConfigFields) -> Mapping[LayerGroup, Rope]:
    """Version 5's `rope_parameters` per layer type; what it leaves out comes from version 4's keys."""
    parameters = fields.section("rope_parameters")
    parameters.only(tuple(_LAYER_TYPES.values()))
    ropes = {}
    for group, base_key in ((LayerGroup.GLOBAL, "rope_theta"), (LayerGroup.LOCAL, "rope_local_base_freq")):
        of_group = parameters.section(_LAYER_TYPES[group])
        theta = fields.positive(base_key, default=_DEFAULT_THETA[group])
        scaling = of_group
        if group is LayerGroup.GLOBAL and "rope_scaling" in fields:
            scaling = fields.section("rope_scaling")
        ropes[group] = Rope(of_group.positive("rope_theta", default=theta), _linear_factor(scaling))
    return ropes


def _linear_factor(fields: ConfigFields) -> float:
    key = "type" if "type" in fields and "rope_type" not in fields else "rope_type"
    if fields.choice(key, ("default", "linear"), default="default") == "default":
        return 1.0
    return fields.positive("factor")


def _vision(fields: ConfigFields, tokens_per_image: int) -> VisionConfig:
    fields.choice("model_type", ("siglip_vision_model",), default="siglip_vision_model")
    hidden_size = fields.integer("hidden_size", default=768)
    num_heads = fields.integer("num_attention_heads", default=12)
    if hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size = {hidden_size}")
    image_size = fields.integer("image_size", default=224)
    patch_size = fields.integer("patch_size", default=16)
    if image_size % patch_size:
        raise fields.error("patch_size", f"a divisor of image_size = {image_size}")
    patches, side = image_size // patch_size, isqrt(tokens_per_image)
    if side * side != tokens_per_image or patches % side:
        raise fields.error(
            "patch_size",
            f"such that the {patches} x {patches} patches of an image pool into "
            f"mm_tokens_per_image = {tokens_per_image} squares",
        )
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", default=3072),
        num_layers=fields.integer("num_hidden_layers", default=12, maximum=_MOST_LAYERS),
        num_heads=num_heads,
        num_channels=fields.integer("num_channels", default=3),
        image_size=image_size,
        patch_size=patch_size,
        hidden_act=fields.choice("hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh"),
        layer_norm_eps=fields.positive("layer_norm_eps", default=1e-6),
        vision_use_head=fields.boolean("vision_use_head", default=True),
    )


def _token(fields: ConfigFields, name: str, *, default: int) -> int:
    """A special token's id, under version 4's name (`..._index`) or version 5's (`..._id`)."""
    key = f"{name}_id" if f"{name}_id" in fields else f"{name}_index"
    return fields.integer(key, default=default, minimum=0)


def _eos_token_ids(*sources: ConfigFields) -> tuple[int, ...]:
    """The first source that has an answer gives it; transformers' default is 1."""
    for fields in sources:
        if "eos_token_id" in fields:
            return fields.token_ids("eos_token_id")
    return (1,)
