"""What the attention signal costs and what it is worth, on the demo model.

    python -m scripts.benchmark_attention_mass cost       a decode step with it against one without
    python -m scripts.benchmark_attention_mass holes      a decode step when blocks have left (bounded KV)
    python -m scripts.benchmark_attention_mass quality    the sampled signal against every layer of every step
    python -m scripts.benchmark_attention_mass accuracy   needles found when blocks have left, chosen in three ways

Operators have one thread, and times are that thread's own. What is compared comes from one run, taken in turns.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.eval_demo import Case, needle_cases
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.engine.loading import LoadedModel, load_model
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Request
from wicore_backend.engine.request import Sequence as Answer
from wicore_backend.engine.runner import ModelRunner, StepOutput
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.attention_mass import AttentionMass
from wicore_backend.hmt.blocks import PrefixMatch
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.processor.prompt import Prompt

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
_SHAPE = StepShape(0, 0, 0, 0)

Floats = NDArray[np.floating[Any]]


# ---- cost -----------------------------------------------------------------------------------------------------------


class Decodes:
    """Sequences in the middle of their answers, over a cache of random keys and values.

    Parameters
    ----------
    starts
        Position of each one's token at first.
    steps
        How many tokens further `move` can take them.
    """

    def __init__(self, model: LoadedModel, starts: Sequence[int], steps: int) -> None:
        self._model = model
        self._starts = starts
        self._answers = [self._open(start + steps + 1) for start in starts]

    def _open(self, tokens: int) -> Answer:
        prompt = Prompt(np.random.default_rng(tokens).integers(300, 2000, tokens).astype(np.int32))
        answer = Answer(Request("benchmark", prompt, SamplingParams(), lambda _: None, 0.0), max_tokens=tokens)
        blocks = self._model.blocks
        answer.blocks = blocks.open(None, PrefixMatch(), max_tokens=tokens, expected_tokens=tokens)
        for start in range(0, tokens, 256):
            assert blocks.extend(answer.blocks, start, min(start + 256, tokens)), "kv_cache_bytes is too small"
        return answer

    def move(self, steps: int) -> None:
        """To `steps` tokens after the start."""
        for answer, start in zip(self._answers, self._starts, strict=True):
            answer.computed = start + steps

    def step(self, averages: Sequence[AttentionMass]) -> float:
        """Seconds of this thread's own time for a step: compute, choose tokens, take in the masses."""
        began = time.thread_time()
        output = self._model.runner.run(StepPlan(self._answers, [], _SHAPE))
        output.logits(range(len(self._answers))).argmax(-1).tolist()
        for row, mass in output.mass().items():
            averages[row].fold(mass)
        return time.thread_time() - began

    @contextmanager
    def keeping(self, share: float) -> Iterator[None]:
        """Meanwhile all but this share of each sequence's global blocks have left, but for the last ones."""
        tables = [answer.running_blocks.tables[LayerGroup.GLOBAL] for answer in self._answers]
        whole = [table.copy() for table in tables]
        for table, start in zip(tables, self._starts, strict=True):
            recent = start // self._model.blocks.block_size - 8
            table[np.random.default_rng(0).permutation(recent)[: int(recent * (1 - share))]] = 0
        yield
        for table, blocks in zip(tables, whole, strict=True):
            table[:] = blocks

    def close(self) -> None:
        for answer in self._answers:
            self._model.blocks.close(answer.running_blocks)


def random_cache() -> LoadedModel:
    """The demo model with random numbers for keys and values, so that nothing need be computed before a decode."""
    model = load_model(
        EngineConfig(
            model=DEMO_MODEL, device="cpu", dtype="float32", kv_cache_bytes=3 * 2**29, max_model_len=2**14 + 1024
        ),
        woken=lambda: None,
    )
    for pool in model.pools.tensors.values():
        pool.normal_()
    return model


def cost(options: argparse.Namespace) -> None:
    """Print what measuring takes of a step: by the time of one measurement, and by steps with and without any.

    The latter is, at each position of a cycle, the median over the rounds, and the mean of those.
    """
    model = random_cache()
    layout = model.pools.layout
    sampling = MassSampling.of(layout, interval=options.interval)
    cycle = options.interval * len(sampling.layers)
    sides = {"without": None, "with": sampling, "each": MassSampling.of(layout, interval=1)}
    print(f"every {options.interval} tokens; {options.rounds} rounds\n")
    print("| context | sequences | ms a step | ms a measurement | measurements a step | so they cost | the step took |")
    print("| --- " * 7 + "|")
    for context in options.contexts:
        for count in options.sequences:
            # As the positions of independent requests, these are spread over the cycle.
            decodes = Decodes(model, [context - i * cycle // count for i in range(count)], cycle)
            averages = [AttentionMass() for _ in range(count)]
            positions = range(max(1, cycle // count))
            # [rounds, positions] of each side, whose turn it is to go first changing from round to round.
            times: dict[str, list[list[float]]] = {name: [] for name in sides}
            for round_ in range(options.rounds + 1):
                order = list(sides) if round_ % 2 else list(reversed(sides))
                taken: dict[str, list[float]] = {name: [] for name in sides}
                for position in positions:
                    decodes.move(position)
                    for name in order:
                        model.runner.sampling = sides[name]
                        taken[name].append(1e3 * decodes.step(averages))
                for name in sides if round_ else ():
                    times[name].append(taken[name])
            without, sampled, each = (np.array(times[name]) for name in sides)
            ms, measurement = np.median(without), np.median(each - without) / count
            a_step = count / options.interval
            cells = [f"{context:,}", str(count), f"{ms:.2f}", f"{measurement:.3f}", f"{a_step:g}"]
            cells += [f"{a_step * measurement / ms:.2%}", f"{np.median(sampled / without, 0).mean() - 1:+.2%}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            decodes.close()


def holes(options: argparse.Namespace) -> None:
    """Print what a decode step takes when most blocks have left."""
    model = random_cache()
    print(f"{options.rounds} rounds\n")
    print(
        "| context | sequences | ms a step | " + " | ".join(f"{share:.1%} of blocks" for share in options.shares) + " |"
    )
    print("| --- " * (3 + len(options.shares)) + "|")
    for context in options.contexts:
        for count in options.sequences:
            decodes = Decodes(model, [context - i for i in range(count)], 0)
            decodes.move(0)
            times: dict[float, list[float]] = {share: [] for share in (1, *options.shares)}
            for round_ in range(options.rounds + 1):
                for share, taken in times.items():
                    with decodes.keeping(share) if share < 1 else nullcontext():
                        took = decodes.step([])
                    if round_:
                        taken.append(1e3 * took)
            cells = [f"{context:,}", str(count), *(f"{np.median(taken):.2f}" for taken in times.values())]
            print(f"| {' | '.join(cells)} |", flush=True)
            decodes.close()


# ---- quality --------------------------------------------------------------------------------------------------------


class Recorder:
    """Runs steps, and keeps the masses of the one request that runs, by the position of its last token."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.masses: dict[int, Floats] = {}

    def run(self, plan: StepPlan) -> StepOutput:
        output = self.runner.run(plan)
        ends = [*(s.computed for s in plan.decodes), *(chunk.end - 1 for chunk in plan.chunks)]
        for row, mass in output.mass().items():
            self.masses[ends[row]] = mass
        return output


@dataclass(frozen=True)
class Recording:
    """The attention mass of one answer: of the prompt's end and of each decode, in each global layer [steps, N]."""

    layers: Sequence[Floats]
    prompt_tokens: int
    needle: slice
    """The blocks with the fact that the question is about."""

    @property
    def truth(self) -> Floats:
        """Mean over the answer's tokens and the layers: where the attention went that a bounded cache must keep."""
        mean: Floats = np.mean([layer[1:] for layer in self.layers], axis=(0, 1))
        return mean

    def sampled(self, interval: int | None, weight: float) -> AttentionMass:
        """What `MassSampling` and `AttentionMass` make of it; without an interval, of the prompt's end alone."""
        average = AttentionMass(weight=weight)
        average.fold(np.mean([layer[0] for layer in self.layers], axis=0))
        for step in range(1, len(self.layers[0])):
            position = self.prompt_tokens - 1 + step
            if interval is not None and position % interval == 0:
                average.fold(self.layers[position // interval % len(self.layers)][step])
        return average


def record(engine: Engine, text: str, answer: str, tokens: int) -> Recording:
    """Answer a needle question for each layer in turn, measuring every token."""
    recorder: Any = Recorder(engine._model.runner)
    engine._model = replace(engine._model, runner=recorder)
    size, layout = engine.config.block_size, engine._model.pools.layout
    messages: Any = [{"role": "user", "content": text}]
    prompt = engine.processor.process(messages)
    layers = []
    for layer in MassSampling.of(layout).layers:
        recorder.runner.sampling, recorder.masses = MassSampling((layer,), 1), {}
        with engine.stream(messages, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)) as stream:
            stream.collect()
        prompt_blocks = layout.blocks_for(len(prompt))
        masses = [mass for position, mass in sorted(recorder.masses.items()) if position >= len(prompt) - 1]
        layers.append(np.stack([mass[:prompt_blocks] for mass in masses]))
    engine._model = replace(engine._model, runner=recorder.runner)

    starts = np.cumsum([0, *(len(engine.processor.tokenizer.token_bytes(int(t))) for t in prompt.token_ids)])
    written = b"".join(engine.processor.tokenizer.token_bytes(int(t)) for t in prompt.token_ids)
    *facts, question = filter(None, re.split(r"(?<=[.。])\s*|\n", text))
    pairs = set(pairwise(question))
    needle = max((fact for fact in facts if answer in fact), key=lambda fact: len(pairs & set(pairwise(fact))))
    at = written.index(needle.encode())
    first, last = np.searchsorted(starts, [at, at + len(needle.encode())], "right") - 1
    return Recording(layers, len(prompt), slice(first // size, last // size + 1))


def top(average: AttentionMass, count: int, *, first: int = 0, recent: int = 0) -> NDArray[np.int64]:
    """The `count` blocks with the best scores, in order of position, but for the `first` and the `recent` ones."""
    between = average.scores()[first : max(first, len(average) - recent)]
    order = np.argsort(between, kind="stable")
    return np.sort(order[max(0, len(between) - count) :]) + first


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def quality(options: argparse.Namespace) -> None:
    """Print how much of the full signal the sampled one tells."""
    recordings = []
    config = EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32", threads=1, prefix_cache=False)
    with Engine(config) as engine:
        for case in needle_cases(options.lengths, options.depths, 1, seed=options.seed):
            [message] = case.messages
            text = "".join(part["text"] for part in message["content"])
            recordings.append(record(engine, text, case.answer, options.tokens))
    print(f"{len(recordings)} answers of {options.tokens} tokens; weight {options.weight}\n")
    print("| measured | rank correlation | top 25% in common | of the mass that 25% can hold | 12.5% |")
    print("| --- " * 5 + "|")
    for interval in [None, *options.intervals]:
        rows = []
        for recording in recordings:
            truth, average = recording.truth, recording.sampled(interval, options.weight)
            quarter, eighth = len(truth) // 4, len(truth) // 8
            best = np.sort(truth)[::-1]
            kept = top(average, quarter)
            rows.append(
                [
                    rank_correlation(average.average(), truth),
                    len(np.intersect1d(kept, np.argsort(-truth)[:quarter])) / quarter,
                    truth[kept].sum() / best[:quarter].sum(),
                    truth[top(average, eighth)].sum() / best[:eighth].sum(),
                ]
            )
        name = "prompt's end only" if interval is None else f"and every {interval} tokens"
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, 0)) + " |")
    ranks = []
    for recording in recordings:
        at_end = recording.sampled(None, 1).average()
        ranks.append(int((at_end > at_end[recording.needle].max()).sum()))
    print(f"\nblocks ahead of the one with the needle at the prompt's end: {sorted(ranks)}")


# ---- accuracy -------------------------------------------------------------------------------------------------------

_FIRST_BLOCKS = 4
_RECENT_BLOCKS = 8

Choice = Literal["mass", "recency", "random"]


class Question:
    """A needle question whose prompt has been computed, its attention mass measured at the end."""

    def __init__(self, model: LoadedModel, case: Case) -> None:
        self._model = model
        self._case = case
        messages: Any = case.messages
        prompt = model.processor.process(messages)
        self._tokens = prompt.token_ids.tolist()
        longest = len(prompt) + 32
        self._sequence = Answer(Request("needle", prompt, SamplingParams(), lambda _: None, 0.0), max_tokens=longest)
        blocks = model.blocks.open(None, PrefixMatch(), max_tokens=longest, expected_tokens=longest)
        self._sequence.blocks = blocks
        self.mass = AttentionMass()
        for start in range(0, len(prompt), 512):
            chunk = Chunk(self._sequence, start, min(start + 512, len(prompt)))
            assert model.blocks.extend(blocks, start, chunk.end), "kv_cache_bytes is too small"
            for mass in model.runner.run(StepPlan([], [chunk], _SHAPE)).mass().values():
                self.mass.fold(mass)
        assert model.blocks.extend(blocks, len(prompt), longest)

    def right(self, choice: Choice, share: float) -> bool:
        """Whether the answer is right when only that share of the prompt's blocks is there."""
        table = self._sequence.running_blocks.tables[LayerGroup.GLOBAL]
        whole = table.copy()
        table[self._gone(choice, share)] = 0
        # The prompt's last token is computed again, since its attention is what finds the needle.
        self._sequence.tokens, self._sequence.computed = [*self._tokens], len(self._tokens) - 1
        answer: list[int] = []
        while len(answer) < 32 and not self._model.eos_token_ids & set(answer):
            [token] = self._model.runner.run(StepPlan([self._sequence], [], _SHAPE)).logits([0]).argmax(-1).tolist()
            answer.append(token)
            self._sequence.tokens.append(token)
            self._sequence.computed += 1
        table[:] = whole
        return self._model.processor.tokenizer.decode(answer).strip() == self._case.answer

    def _gone(self, choice: Choice, share: float) -> NDArray[np.int64]:
        """The blocks that leave; the ends stay, whatever is chosen between them."""
        between = np.arange(_FIRST_BLOCKS, len(self.mass) - _RECENT_BLOCKS)
        count = max(0, int(share * len(self.mass)) - _FIRST_BLOCKS - _RECENT_BLOCKS)
        match choice:
            case "mass":
                kept = top(self.mass, count, first=_FIRST_BLOCKS, recent=_RECENT_BLOCKS)
            case "recency":
                kept = between[len(between) - count :]
            case "random":
                kept = np.random.default_rng(len(self._tokens)).permutation(between)[:count]
        return np.setdiff1d(between, kept)

    def close(self) -> None:
        self._model.blocks.close(self._sequence.running_blocks)


def accuracy(options: argparse.Namespace) -> None:
    """Print how many answers are right when part of the blocks is left, by how they are chosen."""
    model = load_model(
        EngineConfig(model=DEMO_MODEL, device="cpu", dtype="float32", kv_cache_bytes=2**28), woken=lambda: None
    )
    model.runner.sampling = MassSampling.of(model.pools.layout)
    right: dict[tuple[Choice, float], int] = defaultdict(int)
    asked = 0
    for case in needle_cases([options.length], options.depths, options.needles, seed=options.seed):
        question = Question(model, case)
        asked += 1
        for share in (1, *options.shares):
            for choice in get_args(Choice):
                right[choice, share] += question.right(choice, share)
        question.close()
    print(f"{asked} questions about {options.length:,} tokens; right in %\n")
    print("| chosen by | all blocks | " + " | ".join(f"{share:.1%}" for share in options.shares) + " |")
    print("| --- " * (2 + len(options.shares)) + "|")
    for choice in get_args(Choice):
        cells = [f"{100 * right[choice, share] / asked:.1f}" for share in (1, *options.shares)]
        print(f"| {choice} | {' | '.join(cells)} |")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cost")
    command.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 16384])
    command.add_argument("--sequences", type=int, nargs="*", default=[1, 16])
    command.add_argument("--interval", type=int, default=16)
    command.add_argument("--rounds", type=int, default=15)
    command.set_defaults(run=cost)
    command = commands.add_parser("holes")
    command.add_argument("--contexts", type=int, nargs="*", default=[4096, 16384])
    command.add_argument("--sequences", type=int, nargs="*", default=[1, 16])
    command.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25, 0.125])
    command.add_argument("--rounds", type=int, default=15)
    command.set_defaults(run=holes)
    command = commands.add_parser("quality")
    command.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096])
    command.add_argument("--depths", type=float, nargs="*", default=[0, 0.5, 1])
    command.add_argument("--tokens", type=int, default=96)
    command.add_argument("--intervals", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    command.add_argument("--weight", type=float, default=0.1)
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=quality)
    command = commands.add_parser("accuracy")
    command.add_argument("--length", type=int, default=8192)
    command.add_argument("--depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1])
    command.add_argument("--needles", type=int, default=2, help="of each depth and language")
    command.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25, 0.125, 0.0625])
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=accuracy)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
