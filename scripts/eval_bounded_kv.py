"""Needles found by the engine when decodes keep part of their KV (`kv_budget_tokens`), by what says which part.

    python -m scripts.eval_bounded_kv --seed 1 --json 1.json
    python -m scripts.eval_bounded_kv 1.json 2.json --plot docs/benchmarks/bounded-kv.png
    python -m scripts.eval_bounded_kv --pace 5                milliseconds a token instead, medians of 5 answers

Each question is asked of the engine itself, first with everything kept, then at each share of its prompt's blocks with
each choice. All choices keep as many blocks, the first and the recent ones among them. Only the first time is the whole
prompt computed: later its blocks come from the prefix cache, exact, and no more than its last tokens are computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.eval_demo import needle_cases
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.hmt.attention_mass import AttentionMass
from wicore_backend.hmt.bounded_kv import KVBudget, Scores, by_mass

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
BLOCK_SIZE = 32


def by_recency(_: AttentionMass, count: int) -> NDArray[np.float32]:
    """The later the better, and nothing comes back."""
    return np.arange(count, dtype=np.float32)


def at_random(_: AttentionMass, count: int) -> NDArray[np.float32]:
    """The same blocks each time that a sequence's are chosen."""
    return np.random.default_rng(7).random(2**16, dtype=np.float32)[:count]


CHOICES: Mapping[str, Scores] = {"mass": by_mass, "recency": by_recency, "random": at_random}


class Answered(NamedTuple):
    """One answer to a question."""

    tokens: int
    """Of the right answer. The first follows from the prompt alone, which is computed exactly."""
    choice: str
    share: float
    right: bool


class Results:
    """Answers, to be told by choice and share."""

    def __init__(self, answers: Iterable[Answered]) -> None:
        self._answers = list(answers)
        self.shares = sorted({answer.share for answer in self._answers}, reverse=True)

    @property
    def asked(self) -> int:
        """Questions."""
        return sum(answer.share == 1 for answer in self._answers)

    def of_several_tokens(self) -> Results:
        """Those to questions whose right answer has more than one token."""
        return Results(answer for answer in self._answers if answer.tokens > 1)

    def percent(self, choice: str, share: float) -> float:
        """Right ones."""
        right = [a.right for a in self._answers if a.share == share and (share == 1 or a.choice == choice)]
        return 100 * sum(right) / len(right)

    def table(self) -> str:
        """In Markdown."""
        lines = ["| chosen by | " + " | ".join(f"{share:.4g}" for share in self.shares) + " |"]
        lines.append("| --- " * (1 + len(self.shares)) + "|")
        for choice in CHOICES:
            cells = [f"{self.percent(choice, share):.1f}" for share in self.shares]
            lines.append(f"| {choice} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Accuracy against the share of the blocks kept."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for choice in CHOICES:
            axes.plot(self.shares, [self.percent(choice, share) for share in self.shares], marker="o", label=choice)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.shares, [f"{share:.1%}" for share in self.shares])
        axes.set(xlabel="global blocks kept", ylabel="right answers, %", ylim=(0, 105))
        axes.set_title(f"Bounded KV (lossy): {self.asked} needle questions")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def load(options: argparse.Namespace) -> Engine:
    """An engine for the questions, on one thread."""
    config = EngineConfig(
        model=DEMO_MODEL,
        device="cpu",
        dtype="float32",
        threads=1,
        block_size=BLOCK_SIZE,
        max_model_len=options.length + 1024,
        kv_budget_tokens=options.length,
    )
    return Engine(config)


def evaluate(options: argparse.Namespace) -> Iterator[Answered]:
    """Ask every question in every way."""
    with load(options) as engine:
        blocks = engine._model.blocks
        for case in needle_cases([options.length], options.depths, options.needles, seed=options.seed):
            messages: Any = case.messages
            prompt_tokens = len(engine.processor.process(messages))
            answer_tokens = len(engine.processor.process(case.answer, raw=True)) - 1  # It begins with <bos>.
            budgets = [("exact", 1.0, KVBudget(prompt_tokens))]
            for share in options.shares:
                budget = KVBudget.of(int(share * prompt_tokens), BLOCK_SIZE)
                budgets += [(name, share, replace(budget, scores=scores)) for name, scores in CHOICES.items()]
            for name, share, budget in budgets:
                blocks.budget = budget
                result = engine.generate(messages, SamplingParams(max_tokens=32, temperature=0.0))
                yield Answered(answer_tokens, name, share, result.text.strip() == case.answer)
        print(f"{options.length:,} tokens, seed {options.seed}: {blocks.bound_counts}")


def pace(options: argparse.Namespace) -> None:
    """Print how long a token of one answer takes at each share, the shares taking turns."""
    taken: dict[float, list[float]] = {share: [] for share in (1.0, *options.shares)}
    params = SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True)
    prompt = [2, *np.random.default_rng(options.seed).integers(300, 2000, options.length - 1).tolist()]
    with load(options) as engine:
        for round_ in range(options.pace + 1):
            for share, times in taken.items():
                budget = KVBudget.of(int(share * len(prompt)), BLOCK_SIZE)
                engine._model.blocks.budget = budget if share < 1 else None
                tpot_s = engine.generate(prompt, params).usage.tpot_s
                if round_ and tpot_s is not None:
                    times.append(1e3 * tpot_s)
    print("| " + " | ".join(f"{share:.4g}" for share in taken) + " |\n" + "| --- " * len(taken) + "|")
    print("| " + " | ".join(f"{np.median(times):.2f}" for times in taken.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="of earlier runs, to be added up instead of another one")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--needles", type=int, default=2, help="of each depth and language")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25, 0.125])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--pace", type=int, metavar="ROUNDS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pace:
        pace(options)
        return
    if options.results:
        read = [json.loads(path.read_text()) for path in options.results]
        results = Results(Answered(*answer) for answers in read for answer in answers)
    else:
        answers = list(evaluate(options))
        results = Results(answers)
        if options.json:
            options.json.write_text(json.dumps(answers))
    if options.plot:
        results.of_several_tokens().plot(options.plot)
    print("right answers in %, by the share of the global blocks kept")
    for of, some in (("all", results), ("those with answers of several tokens", results.of_several_tokens())):
        print(f"\n{some.asked} questions, {of}:\n\n{some.table()}")


if __name__ == "__main__":
    main()
