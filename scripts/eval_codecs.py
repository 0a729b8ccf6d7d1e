"""How right the demo model stays when every KV block has been through a codec.

    python -m scripts.eval_codecs --codecs exact q8 q4 --json build/codecs.json
    python -m scripts.eval_codecs --needles 1 --lengths 1024 --count 1      # a few minutes on any CPU
    python -m scripts.eval_codecs --device cuda --dtype bfloat16 --rounds 99 --seconds 60 --jobs 4

A step's newly completed blocks are encoded and decoded in place, in both pools, before the next step. Each prompt is
computed twice: the second time the engine resumes it from the blocks of the first, as from a colder tier, so that all
the answer sees has been through the codec, but for the tokens after the last full block. Only the second answer counts.

Each round has other questions, the same for all codecs. "Lost" are questions that `exact` answers rightly and the codec
wrongly, of the rounds that both have done; "gained" the other way round. The bounds are one-sided, at 95% confidence
(Clopper and Pearson): of lost questions less often than the one, and of wrong answers less often than the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from math import exp, lgamma, log, log1p
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from scripts.eval_demo import CHECKPOINT, Case, Messages, Outcome, WicoreAnswerer, ask, needle_cases, score, skill_cases
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.runner import ModelRunner, StepOutput
from wicore_backend.hmt.codecs import CodecName, make_codec
from wicore_backend.hmt.pool import KVPools


class CodecRunner:
    """Runs steps, and passes each block that a step completes through a codec, once."""

    def __init__(self, runner: ModelRunner, pools: KVPools, codec: CodecName) -> None:
        self._runner = runner
        self._pools = pools
        self._codecs = {
            group: make_codec(codec, pools.layout.block_shape(group), pool.dtype)
            for group, pool in pools.tensors.items()
        }
        self.passed = 0
        """Blocks so far, of both groups."""

    def run(self, plan: StepPlan, ahead: Tensor | None = None) -> StepOutput:
        output = self._runner.run(plan, ahead)
        size = self._pools.layout.block_size
        chunks = [*(Chunk(s, s.computed, s.computed + 1) for s in plan.decodes), *plan.chunks]
        for group, pool in self._pools.tensors.items():
            completed = sorted(
                {
                    int(block)
                    for chunk in chunks
                    for block in chunk.sequence.running_blocks.tables[group][chunk.start // size : chunk.end // size]
                    if block
                }
            )
            if completed:
                rows = torch.tensor(completed, device=pool.device)
                blocks, codec = pool.index_select(0, rows), self._codecs[group]
                codec.decode(codec.encode(blocks), out=blocks)
                pool.index_copy_(0, rows, blocks)
                self.passed += len(completed)
        return output


class CodecAnswerer(WicoreAnswerer):
    """Wicore's engine, each prompt resumed from blocks that have been through a codec."""

    def __init__(self, engine: Engine, codec: CodecName) -> None:
        self._params = SamplingParams
        self._engine = engine
        self.runner = CodecRunner(engine._model.runner, engine._model.pools, codec)
        replaced: Any = self.runner
        engine._model = replace(engine._model, runner=replaced)

    def generate(
        self, prompts: Sequence[Messages], images: Sequence[list[Image.Image]], *, max_tokens: int
    ) -> list[str]:
        super().generate(prompts, images, max_tokens=1)
        return super().generate(prompts, images, max_tokens=max_tokens)


def upper_bound(events: int, trials: int, confidence: float = 0.95) -> float:
    """What the probability of an event is below, given how many there were: Clopper and Pearson, one side."""
    # By logarithms: of thousands of trials the ways to choose hundreds are more than a float holds.
    ways = [lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1) for k in range(events + 1)]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        once, never = log(middle), log1p(-middle)
        at_most = sum(exp(way + k * once + (trials - k) * never) for k, way in enumerate(ways))
        low, high = (middle, high) if at_most > 1 - confidence else (low, middle)
    return high


def cases_of_rounds(options: argparse.Namespace) -> Iterator[list[Case]]:
    for seed in range(options.seed, options.seed + options.rounds):
        pictures = (case for case in skill_cases(options.count, seed=seed) if case.label.startswith("picture/"))
        yield [*pictures, *needle_cases(options.lengths, options.depths, options.needles, seed=seed)]


def outcomes_with(codec: CodecName, options: argparse.Namespace) -> tuple[list[list[Outcome]], int, float]:
    """Of each round; how many blocks went through the codec; seconds."""
    began = time.monotonic()
    config = EngineConfig(
        model=CHECKPOINT,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        kv_cache_bytes=2**30,
    )
    rounds: list[list[Outcome]] = []
    with Engine(config) as engine:
        answerer = CodecAnswerer(engine, codec)
        for cases in cases_of_rounds(options):
            rounds.append(list(ask(answerer, cases, batch_tokens=options.batch_tokens, seed=options.seed, workers=2)))
            if time.monotonic() - began > options.seconds:
                break
    return rounds, answerer.runner.passed, time.monotonic() - began


def compared(exact: Sequence[Outcome], other: Sequence[Outcome]) -> list[str]:
    """Cells: lost, gained, and the bounds of lost and wrong."""
    pairs = list(zip(exact, other, strict=True))
    assert all(a.case == b.case for a, b in pairs)
    lost, gained = (sum(a.right and not b.right for a, b in each) for each in (pairs, [(b, a) for a, b in pairs]))
    wrong = sum(not b.right for _, b in pairs)
    bounds = [f"{100 * upper_bound(events, len(pairs)):.2f}%" for events in (lost, wrong)]
    return [f"{lost} of {len(pairs)}", str(gained), *bounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="*", choices=get_args(CodecName), default=get_args(CodecName))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--count", type=int, default=4, help="a round's questions of each picture skill and language")
    parser.add_argument("--needles", type=int, default=2, help="a round's of each length, depth and language")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192], help="of lists, in tokens")
    parser.add_argument("--depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1], help="0 first, 1 last")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--rounds", type=int, default=1, help="at most so many, of other questions each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no codec begins a round")
    parser.add_argument("--jobs", type=int, default=1, help="codecs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, help="of an operator; 1 where other work shares the CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write scores and wrong answers")
    options = parser.parse_args()

    columns = ["picture/", *(f"needle/{length // 1024}K/" for length in options.lengths)]
    print(f"{options.dtype} on {options.device}\n")
    more = ["lost", "gained", "lost less often than", "wrong less often than", "blocks", "s"]
    print("| codec | " + " | ".join([*(name.rstrip("/") for name in columns), *more]) + " |")
    print("| --- " * (len(columns) + len(more) + 1) + "|", flush=True)
    content: dict[str, Any] = {}
    exact: list[list[Outcome]] | None = None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        results = pool.map(partial(outcomes_with, options=options), options.codecs)
        for codec, (rounds, passed, seconds) in zip(options.codecs, results, strict=True):
            outcomes = [outcome for each in rounds for outcome in each]
            scores = [score(outcomes, name) for name in columns]
            exact = rounds if codec == "exact" else exact
            comparison = [""] * 4
            if exact is not None:
                both = [
                    (a, b) for one, other in zip(exact, rounds, strict=False) for a, b in zip(one, other, strict=True)
                ]
                comparison = compared(*map(list, zip(*both, strict=True)))
            print(
                f"| {' | '.join([codec, *map(str, scores), *comparison, f'{passed:,}', f'{seconds:.0f}'])} |",
                flush=True,
            )
            content[codec] = {
                "rounds": len(rounds),
                "scores": {name: vars(each) for name, each in zip(columns, scores, strict=True)},
                "comparison": comparison,
                "wrong": [
                    {"label": o.case.label, "answer": o.answer, "expected": o.case.answer}
                    for o in outcomes
                    if not o.right
                ],
            }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
