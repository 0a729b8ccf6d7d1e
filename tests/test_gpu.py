"""The engine on a CUDA device: the answers of the CPU in float32."""

from pathlib import Path

import pytest
import torch

from wicore_backend import Engine, EngineConfig, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

ROOT = Path(__file__).resolve().parent.parent
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
FACTS = " ".join(f"The code of box {n} is {n * 37 % 1000}." for n in range(300))
PROMPTS: list[tuple[str, list[bytes]]] = [
    ("Describe this picture.", [PICTURE]),
    ("描述这张图片", [PICTURE]),
    ("How many things are there?", [PICTURE]),
    ("What colour is the circle?", [PICTURE]),
    *[(f"What is {a} + {a * 3 % 20}?", []) for a in range(20)],
    *[(f"Reverse: {word}", []) for word in ("apple", "river", "stone", "cloud", "green", "table")],
    (f"{FACTS} What is the code of box 123?", []),
]


def answers(device, dtype):
    with Engine(EngineConfig(model=ROOT / "models" / "wicore-demo", device=device, dtype=dtype)) as engine:
        params = SamplingParams(max_tokens=40, temperature=0.0)
        prompts, images = [p for p, _ in PROMPTS], [i for _, i in PROMPTS]
        results = engine.generate(prompts, params, images=images)
        engine._model.blocks.check_integrity()
        return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def on_cpu():
    return answers("cpu", "float32")


def test_float32_gives_the_tokens_of_the_cpu(on_cpu):
    assert answers("cuda", "float32") == on_cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_all_of_them(on_cpu, dtype):
    same = sum(a == b for a, b in zip(answers("cuda", dtype), on_cpu, strict=True))
    assert same >= 0.9 * len(PROMPTS)


def test_the_cache_takes_its_share_of_the_free_memory():
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    settings = EngineConfig(model=ROOT / "models" / "wicore-demo", device="cuda", hmt_gpu_threshold=0.05)
    with Engine(settings) as engine:
        taken = free - torch.cuda.mem_get_info()[0]
        assert len(engine.generate("hello", SamplingParams(max_tokens=3)).token_ids) <= 3
    assert 0 < taken <= 0.07 * free
