"""What executors are held against: transformers' own Gemma-3, float32 with eager attention, on random checkpoints.

What transformers 5.23 does with pictures (create_masks_for_vision_model): a run of tokens whose token type is 1 is one
picture. Global layers let a token see what is causal or of its own picture; local layers see of that only what lies
less than a window behind, so that in a picture longer than the window a soft token sees all of the picture ahead of it
but not its beginning. Pictures are told apart by a gap in the token types: two without any token between them would
count as one. Gemma-3's processor always puts begin and end tokens around each, and so do these prompts.

What it does not do: it takes `attn_logit_softcapping` from the config but never passes it to its attention, and
`final_logit_softcapping` works in the text-only model alone. Both are applied to the reference here, where a config
has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3 import modeling_gemma3

from tests.gemma3_driver import Driver, Sequence
from tests.gemma3_random import BOI_TOKEN, EOI_TOKEN, FIRST_TEXT_TOKEN, IMAGE_TOKEN, TOKENS_PER_IMAGE

NEW_TOKENS = 64
LOCAL, GLOBAL = "sliding_attention", "full_attention"
IMAGE = "image"


@dataclass(frozen=True)
class Case:
    """A configuration and the prompts, each a list of text lengths and images, computed in chunks of `chunk`."""

    text: dict[str, Any]
    prompts: tuple[tuple[int | str, ...], ...]
    vision: dict[str, Any] | None = None
    chunk: int = 1000


FIVE_TO_ONE = {"num_hidden_layers": 7, "sliding_window_pattern": 6}

CASES = {
    "one query head a KV head": Case({"num_key_value_heads": 4}, ((20,), (45,))),
    "two query heads a KV head, window longer than the prompt": Case({"sliding_window": 500}, ((50,), (7,), (80,))),
    "four query heads a KV head, window shorter than the prompt": Case(
        {"num_key_value_heads": 1, "sliding_window": 10}, ((60,), (9,), (1,)), chunk=25
    ),
    "eight query heads a KV head": Case(
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}, ((33,), (70,))
    ),
    "all layers global": Case({"layer_types": [GLOBAL] * 3, "num_hidden_layers": 3}, ((64,), (30,)), chunk=16),
    "all layers local but the last": Case({"layer_types": [LOCAL] * 3 + [GLOBAL]}, ((100,), (23,)), chunk=37),
    "all layers local": Case({"layer_types": [LOCAL] * 2, "num_hidden_layers": 2}, ((90,), (5,))),
    "five local layers to a global one, odd count": Case(FIVE_TO_ONE, ((75,), (110,), (3,)), chunk=48),
    "linear scaling of positions": Case(
        {
            "layer_types": [LOCAL, GLOBAL, GLOBAL],
            "num_hidden_layers": 3,
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        ((150,), (40,)),
    ),
    "soft-capped scores and logits": Case(
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, **FIVE_TO_ONE}, ((70,), (31,)), chunk=40
    ),
    "biases in attention": Case({"attention_bias": True}, ((40,), (12,))),
    "one layer, a norm with a large eps": Case(
        {"num_hidden_layers": 1, "layer_types": [GLOBAL], "rms_norm_eps": 0.1}, ((18,),)
    ),
    "an image at the start, in the middle, at the end": Case(
        FIVE_TO_ONE, ((IMAGE, 20), (15, IMAGE, 15), (30, IMAGE)), vision={}, chunk=60
    ),
    "several images, adjacent ones too": Case(
        {"layer_types": [LOCAL, GLOBAL] * 2}, ((10, IMAGE, IMAGE, 9), (IMAGE, 5, IMAGE, 30, IMAGE), (12,)), vision={}
    ),
    "an image longer than the window": Case(
        {"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL], "sliding_window": 6, "num_key_value_heads": 1},
        ((25, IMAGE, 3), (IMAGE, IMAGE, IMAGE)),
        vision={},
        chunk=30,
    ),
    "a tower of other sizes, text beside images": Case(
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        ((40,), (8, IMAGE, 8)),
        vision={
            "image_size": 48,
            "patch_size": 6,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "layer_norm_eps": 0.1,
        },
    ),
}


def generate_together(driver: Driver, sequences: list[Sequence], *, chunk: int) -> list[Tensor]:
    """Prefill in chunks and decode greedily, all sequences in one batch, the next joining as the last one decodes."""
    logits: dict[Sequence, list[Tensor]] = {s: [] for s in sequences}
    targets = {s: len(s.ids) + NEW_TOKENS for s in sequences}
    joined = 1
    while active := [s for s in sequences[:joined] if len(s.ids) < targets[s]]:
        chunks = [(s, _chunk(s, chunk)) for s in active]
        chunks.sort(key=lambda c: c[1] > 1)
        for (sequence, _), of_chunk in zip(chunks, driver.step(chunks), strict=True):
            logits[sequence].append(of_chunk)
            if sequence.computed == len(sequence.ids):
                sequence.ids.append(int(greedy(of_chunk[-1:])))
                joined = max(joined, min(sequences.index(sequence) + 2, len(sequences)))
    for sequence in sequences:
        driver.release(sequence)
    return [torch.cat(logits[s]) for s in sequences]


def _chunk(sequence: Sequence, size: int) -> int:
    """Tokens of the sequence's next chunk, which splits no image."""
    end = min(len(sequence.ids), sequence.computed + size)
    for first, _ in sequence.images:
        if first < end < first + TOKENS_PER_IMAGE:
            end = first
    return end - sequence.computed


def sequence_of(prompt: tuple[int | str, ...], image_size: int, generator: torch.Generator) -> Sequence:
    sequence = Sequence([])
    for part in prompt:
        if isinstance(part, int):
            sequence.ids += torch.randint(FIRST_TEXT_TOKEN, 160, (part,), generator=generator).tolist()
        else:
            sequence.images.append((len(sequence.ids) + 1, torch.randn(3, image_size, image_size, generator=generator)))
            sequence.ids += [BOI_TOKEN, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, EOI_TOKEN]
    return sequence


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    """transformers' logits of the whole sequence, alone and at once."""
    ids = torch.tensor([sequence.ids])
    pictures = {}
    if sequence.images:
        pixels = torch.stack([pixels for _, pixels in sequence.images])
        pictures = {"pixel_values": pixels, "token_type_ids": (ids == IMAGE_TOKEN).long()}
    logits: Tensor = model(input_ids=ids, use_cache=False, **pictures).logits[0]
    return logits


def greedy(logits: Tensor) -> Tensor:
    """The best text token of each row: a special token in the answer would be taken for a picture."""
    return logits[:, FIRST_TEXT_TOKEN:].argmax(-1) + FIRST_TEXT_TOKEN


def pass_on_the_softcap(monkeypatch: Any, softcap: float | None) -> None:
    eager = modeling_gemma3.eager_attention_forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        return eager(*args, **kwargs, softcap=softcap)

    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
