"""How right the demo model stays when prompts are multiplied by INT4 weights in FP8, as `int4_prefill_dtype` has it.

    python -m scripts.quantize models/wicore-demo demo-int4 --to int4 --group 64
    python -m scripts.eval_int4_prefill demo-int4 --count 8 --needles 2 --lengths 1024 --json build/int4-prefill.json

On a CPU, in float32, by plain twins that round as the kernels do: steps of more than `--beyond` tokens have each row,
and each output's weights, in e4m3 with a scale of its own. Every matrix is, those included whose groups no kernel
reads, where a GPU would stay exact. The same questions are asked both ways. "Lost" are those that are right without
and wrong with FP8, "gained" the other way round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from torch import Tensor

from scripts.eval_demo import (
    Case,
    Outcome,
    WicoreAnswerer,
    ask,
    mixed_cases,
    needle_cases,
    scattered_cases,
    score,
    skill_cases,
    wording_cases,
)
from wicore_backend.executor.linear import Linear
from wicore_backend.models.gemma3.weights import Weight
from wicore_backend.quantization.fp8 import quantized_rows
from wicore_backend.quantization.int4 import Int4Matrix, in_fp8


@dataclass
class Rows:
    """How many an engine's INT4 matrices multiplied, and in FP8."""

    all: int = 0
    narrow: int = 0


class NarrowLinear:
    """`Linear` of an INT4 weight that multiplies more than `beyond` rows at once in FP8."""

    def __init__(self, weight: Int4Matrix, bias: Tensor | None, *, beyond: int, rows: Rows) -> None:
        self._exact, self._narrow = Linear(weight, bias), Linear(in_fp8(weight), bias)
        self._beyond, self._rows = beyond, rows

    def __call__(self, x: Tensor) -> Tensor:
        self._rows.all += len(x)
        if len(x) <= self._beyond:
            return self._exact(x)
        self._rows.narrow += len(x)
        return self._narrow(quantized_rows(x).dequantized())


@contextmanager
def narrow(beyond: int) -> Iterator[Rows]:
    """Executors that are made meanwhile on a CPU multiply steps of more than `beyond` tokens in FP8."""
    rows = Rows()

    def linear(weight: Weight, bias: Tensor | None = None) -> Linear | NarrowLinear:
        if isinstance(weight, Int4Matrix):
            return NarrowLinear(weight, bias, beyond=beyond, rows=rows)
        return Linear(weight, bias)

    with mock.patch("wicore_backend.executor.torch_executor.Linear", linear):
        yield rows


def outcomes(model: Path, cases: Sequence[Case], *, seed: int) -> list[Outcome]:
    """In the order of the questions' sizes, which is the same each time."""
    answerer = WicoreAnswerer(model, device="cpu", dtype="float32", kv_dtype="auto")
    with answerer._engine:
        return list(ask(answerer, cases, batch_tokens=8192, seed=seed, workers=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="with INT4 weights")
    parser.add_argument("--beyond", type=int, nargs="+", default=[128], help="tokens of a step, a run each")
    parser.add_argument("--count", type=int, default=8, help="cases of each skill and language")
    parser.add_argument("--needles", type=int, default=2, help="cases of each length, depth and language")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024], help="of lists, in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the scores, and every answer that differs")
    options = parser.parse_args()
    cases = [
        *skill_cases(options.count, seed=options.seed),
        *wording_cases(options.count, seed=options.seed),
        *scattered_cases(options.count, seed=options.seed),
        *mixed_cases(2 * options.count, seed=options.seed),
        *needle_cases(options.lengths, (0, 0.25, 0.5, 0.75, 1), options.needles, seed=options.seed),
    ]
    exact: list[Outcome] = []
    report = []
    for beyond in (None, *options.beyond):
        began = time.monotonic()
        # Without FP8 likewise, but that no step is so long.
        with narrow(2**62 if beyond is None else beyond) as rows:
            found = outcomes(options.model, cases, seed=options.seed)
        exact = exact or found
        pairs = list(zip(exact, found, strict=True))
        needles = score(found, "needle/")
        everything = score(found)
        report.append(
            {
                "FP8 in steps of more than": beyond,
                "rows in FP8": round(rows.narrow / rows.all, 4),
                "questions": [everything.right - needles.right, everything.total - needles.total],
                "needles": [needles.right, needles.total],
                "lost": sum(was.right and not now.right for was, now in pairs),
                "gained": sum(now.right and not was.right for was, now in pairs),
                "answers that differ": [
                    {"label": was.case.label, "was": was.answer, "is": now.answer, "expected": was.case.answer}
                    for was, now in pairs
                    if was.answer != now.answer
                ],
                "seconds": round(time.monotonic() - began),
            }
        )
        told = {name: len(value) if name == "answers that differ" else value for name, value in report[-1].items()}
        print(json.dumps(told), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
