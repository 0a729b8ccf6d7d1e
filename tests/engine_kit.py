"""What tests of a whole engine share: the demo model, prompts for it, and the proof that nothing is left behind."""

import time
from pathlib import Path

from wicore_backend import Engine, EngineConfig, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()

PROMPTS: list = [
    ("Describe this picture.", [PICTURE]),
    ("What is 12 + 7?", []),
    (
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many things?"}]},
            {"role": "assistant", "content": "There are 2 things."},
            {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
        ],
        [PICTURE, PICTURE],
    ),
    ([2, 300, 301, 302], []),
    ("The code of Anna is 4821. " * 60 + "What is the code of Anna?", []),
]


def config(**settings):
    return EngineConfig(**{"model": MODEL, "device": "cpu", "dtype": "float32"} | settings)


def greedy(tokens=16, **params):
    return SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | params)


def assert_nothing_left(engine: Engine, *, within_s: float = 20) -> None:
    """The engine comes to have no work and to use no block, and its books are right."""
    end = time.monotonic() + within_s
    while True:
        now = engine.statistics()
        if not now.running and not now.waiting and not any(usage.active for usage in now.blocks.values()):
            break
        assert time.monotonic() < end, now
        time.sleep(0.01)
    engine._scheduler.check_integrity()
