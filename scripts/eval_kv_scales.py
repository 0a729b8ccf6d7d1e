"""What rounding keys and values to e4m3 loses, with no scale and with some: on the demo model, and on random numbers.

    python -m scripts.eval_kv_scales

The error is that of all numbers of a kind together, ||rounded - kept|| / ||kept||, in %. A scale brings the largest
magnitude of its group to e4m3's largest number, 448. The demo model's keys and values are those of a picture, sums and
texts; attention's error is that of softmax(q k) v over 4,096 random keys, as sharp as Gemma-3-27B's first tokens allow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from scripts.eval_demo import CHECKPOINT, skill_cases
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.hmt.fp8 import LARGEST, to_fp8

_GROUPS: Mapping[str, tuple[int, ...]] = {
    "none": (),
    "a layer": (0, 1, 2, 3),
    "a head of a layer": (0, 1, 3),
    "a head of a block": (1, 3),
    "a head of a token": (3,),
}
"""Axes of [blocks, tokens, heads, channels] that share a scale."""


def rounded(numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
    """float32 [blocks, tokens, heads, channels] by way of e4m3."""
    if not axes:
        return to_fp8(numbers).float()
    scale = numbers.abs().amax(axes, keepdim=True).clamp(min=2.0**-100) / LARGEST
    return to_fp8(numbers / scale).float() * scale


def percent(kept: Tensor, other: Tensor) -> float:
    return round(float((other - kept).norm() / kept.norm()) * 100, 3)


def demo_layers() -> list[tuple[Tensor, Tensor]]:
    """Of each layer the keys and values [blocks, tokens, heads, channels] of some conversations."""
    cases = [case for case in skill_cases(1, seed=1) if not case.pictures][:24]
    with Engine(EngineConfig(model=CHECKPOINT, device="cpu", dtype="float32", block_size=16)) as engine:
        for case in cases:
            engine.generate(case.messages, SamplingParams(max_tokens=8, temperature=0.0))
        layout, pools = engine._model.blocks.layout, engine._model.pools.tensors
        layers = []
        for group, index in layout.layers:
            used = pools[group][pools[group].flatten(1).any(1)]
            whole = used[(used != 0).flatten(4).any(4).all(3).all(2).all(1)]  # Blocks all of whose tokens are there.
            layers.append((whole[:, index, 0].clone(), whole[:, index, 1].clone()))
    return layers


def main() -> None:
    layers = demo_layers()
    for name, kind in (("keys", 0), ("values", 1)):
        every = [layer[kind] for layer in layers]
        magnitudes = torch.cat([numbers.flatten() for numbers in every]).abs()
        row: dict[str, object] = {
            "demo model": name,
            "numbers": len(magnitudes),
            "largest": round(float(magnitudes.max()), 2),
            "rms": [round(float(numbers.square().mean().sqrt()), 3) for numbers in every],
            "below 2^-6": f"{float((magnitudes < 2**-6).double().mean()):.2%}",
        }
        for scales, axes in _GROUPS.items():
            row[scales] = percent(
                torch.cat([numbers.flatten() for numbers in every]),
                torch.cat([rounded(numbers, axes).flatten() for numbers in every]),
            )
        print(json.dumps(row), flush=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for magnitude in (2.0**-9, 2.0**-6, 1.0, 64.0, 256.0):
        q, k, v = random(64, 128), random(4096, 128), random(4096, 128) * magnitude
        kept = (q @ k.T * 168**-0.5).softmax(-1) @ v
        row = {"random values": f"rms {magnitude:g}"}
        for scales in ("none", "a layer", "a head of a token"):
            axes = _GROUPS[scales]
            of = [rounded(numbers.view(128, 32, 1, 128), axes).view(4096, 128) for numbers in (k, v)]
            row[scales] = (
                f"values {percent(v, of[1])}, attention {percent(kept, (q @ of[0].T * 168**-0.5).softmax(-1) @ of[1])}"
            )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
