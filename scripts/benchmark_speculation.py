"""Tokens a second with guessed tokens and without, from an engine in this process.

    python -m scripts.benchmark_speculation --threads 1

Three kinds of answers: texts that are said after, where what follows stands in the prompt; the demo model's own
answers to random tokens, which fall into loops; and tokens drawn so hot that nothing repeats, where guessing can only
cost. Both engines take each kind in turn, round after round; their tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, Literal

from wicore_backend import Engine, EngineConfig, SamplingParams

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
_SYLLABLES = ("ka", "lo", "mi", "ter", "san", "vu", "re", "pol", "ni", "dra", "sho", "wen")


def spoken_after(rng: random.Random) -> str:
    """A text to be repeated, of words that nobody has seen."""
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))) for _ in range(40)]
    return f"Repeat: {' '.join(words)}"


def kinds(rng: random.Random, streams: int, new: int) -> dict[str, tuple[list[Any], SamplingParams]]:
    """Prompts of each kind, and how they are to be answered."""
    noise = [[2, *rng.choices(range(300, 1500), k=30)] for _ in range(streams)]
    long = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    return {
        "said after": ([spoken_after(rng) for _ in range(streams)], long),
        "loops": (noise, long),
        "nothing repeats": (noise, long.model_copy(update={"temperature": 100.0, "seed": 1})),
    }


def run(engine: Engine, prompts: list[Any], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Seconds until all are answered, and their tokens."""
    began = time.perf_counter()
    results = [stream.collect() for stream in [engine.stream(prompt, params) for prompt in prompts]]
    return time.perf_counter() - began, [result.token_ids for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of one operator")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--most", type=int, default=8, help="tokens that are guessed at once")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if given.device == "cuda" else "float32"
    engines = {
        most: Engine(
            EngineConfig(
                model=given.model,
                device=given.device,
                dtype=dtype,
                threads=given.threads,
                max_guessed_tokens=most,
                prefix_cache=False,
            )
        )
        for most in (0, given.most)
    }
    guessing = engines[given.most]
    for streams in given.streams:
        for kind, (prompts, params) in kinds(random.Random(streams), streams, given.new).items():
            seconds: dict[int, list[float]] = {most: [] for most in engines}
            before = guessing.statistics().scheduler
            tokens = {}
            for round_ in range(given.rounds + 1):
                for most, engine in engines.items():
                    took, tokens[most] = run(engine, prompts, params)
                    if round_:
                        seconds[most].append(took)
            count = sum(map(len, tokens[0]))
            ratios = [plain / fast for plain, fast in zip(*seconds.values(), strict=True)]
            after = guessing.statistics().scheduler
            row = {
                "streams": streams,
                "answers": kind,
                "tokens_per_s_without": round(count / statistics.median(seconds[0])),
                "tokens_per_s_with": round(count / statistics.median(seconds[given.most])),
                "speed_up": round(statistics.median(ratios), 2),
                "guessed": after.guessed_tokens - before.guessed_tokens,
                "right": after.guessed_right - before.guessed_right,
                "same_tokens": tokens[0] == tokens[given.most],
            }
            print(json.dumps(row), flush=True)
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
