"""How long pictures take through Gemma-3's vision tower, launched kernel by kernel and as CUDA graphs.

    python -m scripts.benchmark_vision --json
    python -m scripts.benchmark_vision --device cpu --small      # a tower that any machine computes, without graphs

The tower of gemma-3-4b, -12b and -27b (SigLIP so400m at 896 x 896, 27 layers) with random weights in bf16. The host's
time is what it takes to launch; the device's what passes from the first kernel to the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wicore_backend.engine.recording import CudaRecorder
from wicore_backend.engine.vision_graphs import BATCHES, VisionGraphs
from wicore_backend.models.gemma3.config import Gemma3Config, VisionConfig
from wicore_backend.models.gemma3.vision import encode_images
from wicore_backend.models.gemma3.weights import Affine, VisionLayerWeights, VisionWeights

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
TOWER = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    num_channels=3,
    image_size=896,
    patch_size=14,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    vision_use_head=False,
)
SMALL = replace(TOWER, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, image_size=224)
HIDDEN = 5376
"""Of gemma-3-27b."""


def random_tower(vision: VisionConfig, hidden: int, device: torch.device) -> VisionWeights:
    """Weights at scales that keep activations as large as they come."""
    D, F = vision.hidden_size, vision.intermediate_size

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0.0, columns**-0.5)

    def affine(rows: int, columns: int) -> Affine:
        return Affine(matrix(rows, columns), torch.zeros(rows, dtype=torch.bfloat16, device=device))

    def norm() -> Affine:
        return Affine(*(torch.full((D,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 0.0)))

    layers = tuple(
        VisionLayerWeights(norm(), affine(3 * D, D), affine(D, D), norm(), affine(F, D), affine(D, F))
        for _ in range(vision.num_layers)
    )
    return VisionWeights(
        patches=affine(D, vision.num_channels * vision.patch_size**2),
        positions=matrix(vision.patches_per_side**2, D),
        layers=layers,
        norm=norm(),
        soft_token_norm=torch.ones(D, device=device),
        projection=matrix(hidden, D),
    )


def products_flop(vision: VisionConfig, hidden: int, soft_tokens: int) -> float:
    """Of a picture's matrix products and attention."""
    D, F, P = vision.hidden_size, vision.intermediate_size, vision.patches_per_side**2
    layer = 2 * P * (4 * D * D + 2 * D * F) + 4 * P * P * D
    return (
        vision.num_layers * layer
        + 2 * P * D * vision.num_channels * vision.patch_size**2
        + 2 * soft_tokens * D * hidden
    )


def milliseconds(encode: Callable[[Tensor], Tensor], pixels: Tensor, rounds: int) -> tuple[float, float]:
    """Medians of the host's time and of the device's; without CUDA both are the same."""
    host, device = [], []
    if pixels.device.type != "cuda":
        for _ in range(rounds):
            began_s = time.perf_counter()
            encode(pixels)
            host.append(time.perf_counter() - began_s)
        return (statistics.median(host) * 1e3,) * 2
    for _ in range(rounds + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        launched = time.perf_counter()
        began.record()
        encode(pixels)
        ended.record()
        host.append(time.perf_counter() - launched)
        ended.synchronize()
        device.append(began.elapsed_time(ended))
    return statistics.median(host[2:]) * 1e3, statistics.median(device[2:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tower of few, small layers")
    parser.add_argument("--json", action="store_true", help="on one line")
    given = parser.parse_args()
    device = torch.device(given.device)
    tower, soft_tokens = (SMALL, 64) if given.small else (TOWER, 256)
    config = replace(Gemma3Config.from_checkpoint(DEMO_MODEL), vision=tower, mm_tokens_per_image=soft_tokens)
    weights = random_tower(tower, HIDDEN, device)
    launched = partial(encode_images, weights=weights, config=config)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"launched": launched}
    if device.type == "cuda":
        recorded = VisionGraphs(launched, CudaRecorder(device))
        recorded.prepare(torch.zeros(3, tower.image_size, tower.image_size, dtype=torch.bfloat16, device=device))
        ways["graph"] = recorded
    flop = products_flop(tower, HIDDEN, config.mm_tokens_per_image)
    rows: list[dict[str, Any]] = []
    for batch in sorted(BATCHES):
        pixels = torch.randn(batch, 3, tower.image_size, tower.image_size, dtype=torch.bfloat16, device=device)
        row: dict[str, Any] = {"pictures": batch}
        if "graph" in ways:
            row["graphs_differ_by"] = (ways["graph"](pixels).float() - launched(pixels).float()).abs().max().item()
        for name, encode in ways.items():
            host, on_device = milliseconds(encode, pixels, given.rounds)
            row |= {f"{name}_host_ms": round(host, 3), f"{name}_device_ms": round(on_device, 3)}
            row[f"{name}_tflop_s"] = round(batch * flop / on_device / 1e9)
        rows.append(row)
    result = {
        "benchmark": "vision",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tflop_a_picture": flop / 1e12,
    }
    print(json.dumps(result | {"rows": rows}, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
