"""The demo model's geometry, its checkpoint files, and a lean training twin of transformers' Gemma-3.

The twin computes what `Gemma3ForConditionalGeneration` computes, with the same weight names, on one packed
stream of conversations: no padding, attention limits per token instead of a mask per sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts.demo_data import tokenizer as tok


@dataclass(frozen=True)
class Geometry:
    """Sizes of the model. The defaults are the tracked demo model: 10 million parameters."""

    vocabulary: int = tok.VOCABULARY
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 704
    window: int = 512
    global_every: int = 3
    query_scalar: int = 16
    """Small, because QK-norm bounds the logits and a needle among 16K keys needs large ones."""
    positions: int = 32768
    global_theta: float = 1e6
    local_theta: float = 1e4
    image_size: int = 896
    patch: int = 56
    image_tokens: int = 64
    vision_hidden: int = 192
    vision_layers: int = 4
    vision_heads: int = 6
    vision_mlp: int = 768

    def is_global(self, layer: int) -> bool:
        return (layer + 1) % self.global_every == 0

    @property
    def patches(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


SMALL = Geometry(
    hidden=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp=128, window=64, image_size=448, image_tokens=16,
    vision_hidden=48, vision_layers=1, vision_heads=2, vision_mlp=96,
)  # fmt: skip
"""For trying the training on a CPU."""


# ---- checkpoint files -----------------------------------------------------------------------------------------------


def gemma3_config(geometry: Geometry) -> dict[str, Any]:
    """`config.json` in Hugging Face's layout, readable by transformers 4 (flat RoPE) and 5 (RoPE per layer type)."""
    text = {
        "model_type": "gemma3_text",
        "vocab_size": geometry.vocabulary,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.mlp,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": geometry.positions,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "pad_token_id": tok.PAD,
        "eos_token_id": tok.EOS,
        "bos_token_id": tok.BOS,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": geometry.query_scalar,
        "sliding_window": geometry.window,
        "sliding_window_pattern": geometry.global_every,
        "layer_types": [
            "full_attention" if geometry.is_global(layer) else "sliding_attention" for layer in range(geometry.layers)
        ],
        "rope_theta": geometry.global_theta,
        "rope_local_base_freq": geometry.local_theta,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": geometry.global_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": geometry.local_theta},
        },
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "torch_dtype": "bfloat16",
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": geometry.vision_hidden,
        "intermediate_size": geometry.vision_mlp,
        "num_hidden_layers": geometry.vision_layers,
        "num_attention_heads": geometry.vision_heads,
        "num_channels": 3,
        "image_size": geometry.image_size,
        "patch_size": geometry.patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": geometry.image_tokens,
        "boi_token_index": tok.START_OF_IMAGE,
        "eoi_token_index": tok.END_OF_IMAGE,
        "image_token_index": tok.IMAGE_SOFT_TOKEN,
        "bos_token_id": tok.BOS,
        "eos_token_id": [tok.EOS, tok.END_OF_TURN],
        "pad_token_id": tok.PAD,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0",
    }


def write_settings(folder: Path, geometry: Geometry) -> None:
    """Writes every small file of the checkpoint except the tokenizer's own."""
    _write_json(folder / "config.json", gemma3_config(geometry))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tok.BOS,
            "eos_token_id": [tok.EOS, tok.END_OF_TURN],
            "pad_token_id": tok.PAD,
            "do_sample": False,
            "transformers_version": "4.50.0",
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": geometry.image_tokens,
            "image_std": [0.5, 0.5, 0.5],
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": geometry.image_size, "width": geometry.image_size},
        },
    )
    _write_json(
        folder / "processor_config.json",
        {"image_seq_length": geometry.image_tokens, "processor_class": "Gemma3Processor"},
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the twin -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """One packed stream of N tokens with M pictures.

    Token q of a conversation sees the tokens `starts[q] <= k <= limits[q]`, in local layers only those with
    `k > q - window`: `limits[q]` is q itself or, inside a picture, the picture's last token.
    """

    ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64, from 0 in every conversation
    starts: Tensor  # [N] int64
    limits: Tensor  # [N] int64
    picture_rows: Tensor  # [M * image_tokens] int64: where each picture row goes; N means nowhere
    answer_rows: Tensor  # [K] int64: tokens whose successor is part of an answer


Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(q [1, Hq, N, d] already scaled, k [1, Hkv, N, d], v, is_global) -> [1, Hq, N, d]"""


class RMSNorm(nn.Module):
    """Gemma's RMSNorm: scales by 1 + weight, in float32."""

    def __init__(self, size: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain - 1.0))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


class Attention(nn.Module):
    def __init__(self, geometry: Geometry, *, is_global: bool) -> None:
        super().__init__()
        self.is_global = is_global
        self.head_dim = geometry.head_dim
        self.scale = geometry.query_scalar**-0.5
        self.q_proj = _linear(geometry.hidden, geometry.heads * geometry.head_dim)
        self.k_proj = _linear(geometry.hidden, geometry.kv_heads * geometry.head_dim)
        self.v_proj = _linear(geometry.hidden, geometry.kv_heads * geometry.head_dim)
        self.o_proj = _linear(geometry.heads * geometry.head_dim, geometry.hidden)
        self.q_norm = RMSNorm(geometry.head_dim)
        self.k_norm = RMSNorm(geometry.head_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(1, x.shape[0], -1, self.head_dim).transpose(1, 2)  # [1, H, N, d]

        q = _rotate(self.q_norm(heads(self.q_proj(x))), rope) * self.scale
        k = _rotate(self.k_norm(heads(self.k_proj(x))), rope)
        out = attend(q, k, heads(self.v_proj(x)), self.is_global)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(x.shape[0], -1))
        return mixed


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class MLP(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.gate_proj = _linear(geometry.hidden, geometry.mlp)
        self.up_proj = _linear(geometry.hidden, geometry.mlp)
        self.down_proj = _linear(geometry.mlp, geometry.hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, geometry: Geometry, *, is_global: bool) -> None:
        super().__init__()
        # A small gain after each block keeps the embedding visible in the residual stream at the start.
        self.self_attn = Attention(geometry, is_global=is_global)
        self.mlp = MLP(geometry)
        self.input_layernorm = RMSNorm(geometry.hidden)
        self.post_attention_layernorm = RMSNorm(geometry.hidden, gain=0.3)
        self.pre_feedforward_layernorm = RMSNorm(geometry.hidden)
        self.post_feedforward_layernorm = RMSNorm(geometry.hidden, gain=0.3)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, attend))
        out: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out


class LanguageModel(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.embed_tokens = nn.Embedding(geometry.vocabulary, geometry.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=geometry.hidden**-0.5)
        self.layers = nn.ModuleList(
            DecoderLayer(geometry, is_global=geometry.is_global(layer)) for layer in range(geometry.layers)
        )
        self.norm = RMSNorm(geometry.hidden)

    def rope(self, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.geometry.head_dim, 2, device=positions.device) / self.geometry.head_dim
        angles = positions[:, None].float() * theta ** -exponents.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        global_rope = self.rope(positions, self.geometry.global_theta)
        local_rope = self.rope(positions, self.geometry.local_theta)
        for index, layer in enumerate(self.layers):
            x = layer(x, global_rope if self.geometry.is_global(index) else local_rope, attend)
        out: Tensor = self.norm(x)
        return out


class VisionAttention(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.heads = geometry.vision_heads
        size = geometry.vision_hidden
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.fc1 = nn.Linear(geometry.vision_hidden, geometry.vision_mlp)
        self.fc2 = nn.Linear(geometry.vision_mlp, geometry.vision_hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionLayer(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(geometry.vision_hidden, eps=1e-6)
        self.self_attn = VisionAttention(geometry)
        self.layer_norm2 = nn.LayerNorm(geometry.vision_hidden, eps=1e-6)
        self.mlp = VisionMLP(geometry)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEmbeddings(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.patch = geometry.patch
        self.patch_embedding = nn.Conv2d(3, geometry.vision_hidden, geometry.patch, stride=geometry.patch)
        self.position_embedding = nn.Embedding(geometry.patches**2, geometry.vision_hidden)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        count, channels, side, _ = pixels.shape
        across = side // self.patch
        patches = pixels.view(count, channels, across, self.patch, across, self.patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(count, across * across, -1)  # [M, P, 3 * patch^2]
        embedded = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        return embedded + self.position_embedding.weight


class VisionEncoder(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(geometry) for _ in range(geometry.vision_layers))


class VisionTower(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(geometry)
        self.encoder = VisionEncoder(geometry)
        self.post_layernorm = nn.LayerNorm(geometry.vision_hidden, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out


class Projector(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.side = geometry.patches
        self.pool = geometry.patches // round(geometry.image_tokens**0.5)
        self.mm_soft_emb_norm = RMSNorm(geometry.vision_hidden)
        self.mm_input_projection_weight = nn.Parameter(
            torch.randn(geometry.vision_hidden, geometry.hidden) * geometry.vision_hidden**-0.5
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, P, vision_hidden] -> pooled and normed [M, T, vision_hidden], projected [M, T, hidden]."""
        x = x.transpose(1, 2).reshape(len(x), -1, self.side, self.side)
        pooled = self.mm_soft_emb_norm(F.avg_pool2d(x, self.pool).flatten(2).transpose(1, 2))
        return pooled, pooled @ self.mm_input_projection_weight.type_as(pooled)


class Body(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.language_model = LanguageModel(geometry)
        self.vision_tower = VisionTower(geometry)
        self.multi_modal_projector = Projector(geometry)


class Twin(nn.Module):
    """Gemma-3 on one packed stream; `state_dict()` has transformers' names (the head is tied, so not in it)."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.model = Body(geometry)

    def forward(self, stream: Stream, pixels: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Logits [K, V] at the answer rows, and the pooled picture rows [M, T, vision_hidden]."""
        language = self.model.language_model
        embedded = language.embed_tokens(stream.ids) * self.geometry.hidden**0.5
        pooled, rows = self.model.multi_modal_projector(self.model.vision_tower(pixels))
        # One row more than there are tokens takes the rows of absent pictures.
        padded = F.pad(embedded, (0, 0, 0, 1)).type_as(rows)
        x = padded.index_copy(0, stream.picture_rows, rows.flatten(0, 1))[:-1]
        hidden = language(x, stream.positions, attend)
        logits = F.linear(hidden[stream.answer_rows], language.embed_tokens.weight)
        return logits, pooled


def dense_attend(stream: Stream, window: int) -> Attend:
    """Plain attention under explicit masks; for CPUs and short streams."""
    keys = torch.arange(len(stream.ids), device=stream.ids.device)
    seen = (keys >= stream.starts[:, None]) & (keys <= stream.limits[:, None])
    near = seen & (keys > keys[:, None] - window)

    def attend(q: Tensor, k: Tensor, v: Tensor, is_global: bool) -> Tensor:
        mask = seen if is_global else near
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)

    return attend


CHECKPOINT_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""The twin's (and transformers') module prefixes, and what Gemma-3's published checkpoint files call them."""


def save_weights(twin: Twin, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes one safetensors file with the names of Gemma-3's published checkpoints; the head is tied."""
    tensors = {
        _renamed(name, CHECKPOINT_PREFIXES): weight.detach().to("cpu", dtype).contiguous()
        for name, weight in twin.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(path: Path) -> dict[str, Tensor]:
    """The twin's float32 state dict from a file that `save_weights` wrote."""
    prefixes = {theirs: ours for ours, theirs in CHECKPOINT_PREFIXES.items()}
    return {_renamed(name, prefixes): weight.float() for name, weight in load_file(path).items()}


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"weight {name!r} starts with none of {', '.join(prefixes)}")
