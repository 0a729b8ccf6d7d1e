"""How right the demo model stays when every KV block has been through a codec.

    python -m scripts.eval_codecs --codecs exact q8 q4 --json build/codecs.json
    python -m scripts.eval_codecs --needles 1 --lengths 1024 --count 1      # a few minutes on any CPU

A step's newly completed blocks are encoded and decoded in place, in both pools, before the next step. Each prompt is
computed twice: the second time the engine resumes it from the blocks of the first, as from a colder tier, so that all
the answer sees has been through the codec, but for the tokens after the last full block. Only the second answer counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from scripts.eval_demo import CHECKPOINT, Messages, WicoreAnswerer, ask, needle_cases, score, skill_cases
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

    def run(self, plan: StepPlan) -> StepOutput:
        output = self._runner.run(plan)
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
                blocks = pool[rows]
                encoded = self._codecs[group].encode(blocks)
                self._codecs[group].decode(encoded, out=blocks)
                pool[rows] = blocks
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="*", choices=get_args(CodecName), default=get_args(CodecName))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--count", type=int, default=4, help="questions of each picture skill and language")
    parser.add_argument("--needles", type=int, default=2, help="of each length, depth and language")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192], help="of lists, in tokens")
    parser.add_argument("--depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1], help="0 first, 1 last")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--threads", type=int, help="of an operator; 1 where other work shares the CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write scores and wrong answers")
    options = parser.parse_args()

    cases = [
        *(case for case in skill_cases(options.count, seed=options.seed) if case.label.startswith("picture/")),
        *needle_cases(options.lengths, options.depths, options.needles, seed=options.seed),
    ]
    columns = ["picture/", *(f"needle/{length // 1024}K/" for length in options.lengths)]
    print(f"{len(cases)} questions, {options.dtype} on {options.device}\n")
    print("| codec | " + " | ".join(name.rstrip("/") for name in columns) + " | blocks | s |")
    print("| --- " * (len(columns) + 3) + "|", flush=True)
    content = {}
    for codec in options.codecs:
        began = time.monotonic()
        config = EngineConfig(
            model=CHECKPOINT,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            kv_cache_bytes=2**30,
        )
        with Engine(config) as engine:
            answerer = CodecAnswerer(engine, codec)
            outcomes = list(ask(answerer, cases, batch_tokens=options.batch_tokens, seed=options.seed, workers=2))
        scores = [score(outcomes, name) for name in columns]
        cells = [codec, *map(str, scores), f"{answerer.runner.passed:,}", f"{time.monotonic() - began:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        content[codec] = {
            "scores": {name: vars(each) for name, each in zip(columns, scores, strict=True)},
            "wrong": [
                {"label": o.case.label, "answer": o.answer, "expected": o.case.answer} for o in outcomes if not o.right
            ],
        }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
