"""Prompt tokens found in the cache by a2cr with the attention signal, by a2cr without it, and by others.

    python -m scripts.eval_attention_cache --seeds 1 2 3 --json build/attention-cache.json
    python -m scripts.eval_attention_cache --seeds 1 --shares 0.25 --computed

Sessions of several questions over lists of facts, on the engine with the demo model: a device that holds the longest
prompt and little else, host memory for a share of what the load touches, no disk, so that a block that host memory
gives up is computed again. Some documents are popular, the others are asked about once. There are two loads, which
differ in nothing but the questions to documents that never come back:

present     their questions, too, have an answer in the document: attention has nothing to tell reuse by.
absent      theirs are about something that is not in it. It was the wrong document, so nobody asks it again.

All arms get the same requests, one after another, at the same moments of a clock of the load's own. A block's keys
depend on nothing but its prompt, so each request is computed once, where everything is cached; the arms then run the
engine with those tokens and attention masses in place of the model (`--computed` has the model compute every step).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scripts.demo_data.conversation import Request, Split
from scripts.demo_data.facts import needles
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import engine as engine_module
from wicore_backend.engine import loading
from wicore_backend.engine.computation import Computed, compute
from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.request import Sequence as EngineSequence
from wicore_backend.engine.runner import ModelRunner
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import ColdBlocks, LowerTiers
from wicore_backend.hmt.policy.base import Access
from wicore_backend.hmt.policy.history import attention_level

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
LOADS = ("present", "absent")
CHUNK = 1024
"""Tokens of a step. It decides how the device's memory, and with it the host's, is divided between the groups."""

Message = Mapping[str, str]


class Arm(NamedTuple):
    """What decides which blocks leave host memory, and what it is told that attention gave them."""

    policy: str
    told: Literal["attention", "nothing", "returns"]


WITH, WITHOUT = "a2cr with the signal", "a2cr without it"
ARMS: Mapping[str, Arm] = {
    WITH: Arm("a2cr", "attention"),
    WITHOUT: Arm("a2cr", "nothing"),
    "a2cr told what returns": Arm("a2cr", "returns"),
    "lru": Arm("lru", "nothing"),
}
"""The third is no policy but a control: its masses are high where the document comes back, low where it does not."""


# ---- the load -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """What a load is made of.

    Attributes
    ----------
    sessions
        How many; one comes every 10 s on average, and its turns follow each other after 20 s or so.
    documents
        That come back, the n-th most popular of them with a weight of n ** -0.8.
    once
        Share of the sessions that bring a document of their own and ask it one question.
    shortest, longest
        Documents with their questions, in tokens, roughly; log-uniform.
    """

    sessions: int = 220
    documents: int = 32
    once: float = 0.35
    shortest: int = 1280
    longest: int = 2560


@dataclass(frozen=True)
class Ask:
    """One request, at `time` seconds; `returns` if its document is one that comes back."""

    time: float
    document: int
    returns: bool
    messages: list[Message]


class Exchange(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def make_load(shape: LoadShape, name: str, *, seed: int) -> list[Ask]:
    """The requests in order of time. Every session begins with its document and the same first question about it."""
    rng, stray = Random(f"{seed} load"), Random(f"{seed} stray")
    weights = [(rank + 1) ** -0.8 for rank in range(shape.documents)]
    popular = [_document(shape, f"{seed} {number}") for number in range(shape.documents)]
    foreign = _document(shape, f"{seed} foreign")
    asks: list[Ask] = []
    start = 0.0
    for session in range(shape.sessions):
        start += rng.expovariate(1 / 10)
        returns = rng.random() >= shape.once
        number = rng.choices(range(shape.documents), weights)[0] if returns else shape.documents + session
        exchanges = popular[number] if returns else _document(shape, f"{seed} {number}")
        turns = min(4, 1 + int(rng.expovariate(0.6))) if returns else 1
        asked = rng.sample(exchanges[1:], turns)
        if not returns and name == "absent":
            asked = [stray.choice(foreign[1:])]
        time, messages = start, exchanges[0].messages()
        for exchange in asked:
            messages = [*messages, *exchange.messages()]
            asks.append(Ask(time, number, returns, messages[:-1]))
            time += rng.lognormvariate(math.log(20), 1)
    return sorted(asks, key=lambda ask: ask.time)


def _document(shape: LoadShape, name: str) -> list[Exchange]:
    """The list of facts with a question, and its answer; then other questions about it."""
    rng = Random(f"document {name}")
    tokens = round(shape.shortest * (shape.longest / shape.shortest) ** rng.random())
    request = Request(rng, rng.choice(("en", "zh")), Split.HELD_OUT, tokens=tokens + 12 * 26)
    return [Exchange("".join(map(str, t.question)), t.answer) for t in needles(request, facts_share=1.0, questions=12)]


# ---- the engine -----------------------------------------------------------------------------------------------------


@dataclass
class Listener:
    """Decides what the host tier is told.

    Attributes
    ----------
    told
        What they are told of attention.
    now, returns
        The time of the present request, and whether its document comes back.
    names
        Of all blocks of all prompts so far.
    masses
        What the last sequence that was closed gave its full blocks, against the mean of them.
    """

    told: Literal["attention", "nothing", "returns"]
    now: float = 0.0
    returns: bool = False
    names: set[bytes] = field(default_factory=set)
    masses: list[float] = field(default_factory=list)


class HeardTiers(LowerTiers):
    """The lower tiers, with a listener in between."""

    def __init__(self, listener: Listener, host: HostTier, cold: ColdBlocks | None, **options: Any) -> None:
        super().__init__(host, cold, **options)
        self._listener = listener

    def observe(self, access: Access, now: float) -> None:
        assert now >= 0  # The engine's own time, which depends on the machine.
        self._listener.names.update(key for key in access.keys if isinstance(key, bytes))
        super().observe(access, self._listener.now)

    def attend(self, group: LayerGroup, names: Sequence[bytes], masses: Sequence[float]) -> None:
        self._listener.masses = list(masses)
        if self._listener.told == "returns":
            masses = [2.0 if self._listener.returns else 0.5] * len(masses)
        if self._listener.told != "nothing":
            super().attend(group, names, masses)


class Step(NamedTuple):
    """What a step gave one sequence."""

    token: int
    mass: NDArray[np.float32] | None


class Recording:
    """The first results of each sequence of tokens, to be given again without the model."""

    def __init__(self) -> None:
        self._steps: dict[bytes, Step] = {}
        self._vocabulary = 0

    def record(self, runner: ModelRunner, plan: StepPlan, ahead: Tensor | None = None) -> Computed:
        """In place of `compute`, on a CPU, where no step begins before the one ahead of it has ended."""
        assert ahead is None
        computed = compute(runner, plan)
        if computed.logits is not None:
            self._vocabulary = computed.logits.shape[1]
            masses = computed.mass()
            for sequence, token in zip(computed.ready, computed.logits.argmax(-1).tolist(), strict=True):
                self._steps.setdefault(_name(sequence), Step(token, masses.get(sequence)))
        return computed

    def recall(self, _: ModelRunner, plan: StepPlan, ahead: Tensor | None = None) -> Computed:
        """In place of `compute`, too. Raises KeyError for tokens that were never computed."""
        assert ahead is None
        ready = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks if chunk.completes)]
        steps = [self._steps[_name(sequence)] for sequence in ready]
        logits = torch.zeros(len(ready), self._vocabulary)
        for row, step in enumerate(steps):
            logits[row, step.token] = 1.0
        mass = {sequence: step.mass for sequence, step in zip(ready, steps, strict=True) if step.mass is not None}
        rows = {sequence: row for row, sequence in enumerate(ready)}
        return Computed(plan, rows, logits if ready else None, {}, mass=lambda: mass)


def _name(sequence: EngineSequence) -> bytes:
    return hashlib.blake2b(np.asarray(sequence.tokens, np.int32).tobytes(), digest_size=16).digest()


@contextmanager
def open_engine(listener: Listener, computing: Callable[..., Computed], **settings: Any) -> Iterator[Engine]:
    """An engine on one thread that `listener` listens to."""
    with (
        mock.patch.object(loading, "LowerTiers", partial(HeardTiers, listener)),
        mock.patch.object(engine_module, "compute", computing),
        Engine(
            EngineConfig(
                model=DEMO_MODEL,
                device="cpu",
                dtype="float32",
                threads=1,
                max_batch_tokens=CHUNK,
                max_guessed_tokens=0,  # Steps are recorded and recalled one token at a time.
                **settings,
            )
        ) as engine,
    ):
        yield engine


def ask_all(
    engine: Engine, listener: Listener, asks: Iterable[Ask], prompts: Iterable[list[int]]
) -> Iterator[tuple[Ask, int]]:
    """Each request, and how many tokens of its prompt were found in the cache."""
    params = SamplingParams(max_tokens=6, temperature=0.0)
    for ask, prompt in zip(asks, prompts, strict=True):
        listener.now, listener.returns = ask.time, ask.returns
        result: Any = engine.generate(prompt, params)
        yield ask, result.usage.cached_tokens


# ---- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of one arm, at one capacity, with the load of one seed."""

    load: str
    seed: int
    share: float
    arm: str
    global_slots: int
    prompt_tokens: int
    hit_tokens: int


@dataclass(frozen=True)
class FirstAsk:
    """What the first request for a document gave its blocks: their mean, and the most of any but the first four."""

    load: str
    returns: bool
    mean: float
    peak: float


@dataclass(frozen=True)
class Recorded:
    """A load that has been computed once, with everything cached."""

    recording: Recording
    prompts: list[list[int]]
    layout: KVLayout
    working_set: int
    """Global blocks that the prompts have."""
    hit_tokens: int
    first_asks: list[FirstAsk]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def record(name: str, asks: Sequence[Ask]) -> Recorded:
    """Compute every request."""
    listener, recording, first_asks = Listener("nothing"), Recording(), []
    known: set[int] = set()
    settings = {"kv_cache_bytes": 3 * 2**30, "host_cache_bytes": 2**26, "max_model_len": 6144}
    with open_engine(listener, recording.record, **settings) as engine:
        processed: list[Any] = [ask.messages for ask in asks]
        prompts = [engine.processor.process(messages).token_ids.tolist() for messages in processed]
        hits = 0
        for ask, found in ask_all(engine, listener, asks, prompts):
            hits += found
            if ask.document not in known:
                known.add(ask.document)
                first_asks.append(FirstAsk(name, ask.returns, fmean(listener.masses), max(listener.masses[4:])))
        layout = engine._model.blocks.layout
    return Recorded(recording, prompts, layout, len(listener.names), hits, first_asks)


def run_arm(arm: Arm, asks: Sequence[Ask], recorded: Recorded, *, slots: int, computed: bool) -> int:
    """Prompt tokens found where host memory has that many slots for global blocks."""
    layout, longest = recorded.layout, max(map(len, recorded.prompts)) + 32
    least = {group: layout.blocks_held(group, longest, CHUNK) + 1 for group in layout.groups}
    memory = sum(least[group] * layout.block_bytes(group) for group in layout.groups)
    listener = Listener(arm.told)
    with open_engine(
        listener,
        compute if computed else recorded.recording.recall,
        kv_cache_bytes=memory,
        host_cache_bytes=math.ceil(slots * memory / least[LayerGroup.GLOBAL]),
        max_model_len=longest,
        max_running=1,
        hmt_policy=arm.policy,
    ) as engine:
        return sum(found for _, found in ask_all(engine, listener, asks, recorded.prompts))


def evaluate(options: argparse.Namespace, shape: LoadShape) -> tuple[list[Outcome], list[FirstAsk]]:
    """All arms on all loads."""
    outcomes: list[Outcome] = []
    first_asks: list[FirstAsk] = []
    for name in options.loads:
        for seed in options.seeds:
            asks = make_load(shape, name, seed=seed)
            recorded = record(name, asks)
            first_asks += recorded.first_asks
            print(
                f"{name}, seed {seed}: {len(asks)} requests of {recorded.prompt_tokens:,} tokens, of which a cache "
                f"that loses nothing finds {recorded.hit_tokens:,}; they touch {recorded.working_set:,} global blocks",
                flush=True,
            )
            for share in options.shares:
                slots = int(share * recorded.working_set)
                for arm_name, arm in ARMS.items():
                    found = run_arm(arm, asks, recorded, slots=slots, computed=options.computed)
                    outcomes.append(Outcome(name, seed, share, arm_name, slots, recorded.prompt_tokens, found))
    return outcomes, first_asks


def table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown: hit tokens of each arm, and those of a2cr with the signal against without it."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    hits = {(o.load, o.share, o.arm, o.seed): o.hit_tokens for o in outcomes}
    lines = [
        f"| load | host memory | seed | {' | '.join(ARMS)} | the signal's part |",
        "| --- " * (len(ARMS) + 4) + "|",
    ]
    for load, share in dict.fromkeys((o.load, o.share) for o in outcomes):
        cells = {arm: [hits[load, share, arm, seed] for seed in seeds] for arm in ARMS}
        rows = [(str(seed), [cells[arm][row] for arm in ARMS]) for row, seed in enumerate(seeds)]
        rows.append(("all", [sum(cells[arm]) for arm in ARMS]))
        for seed_name, found in rows:
            named = dict(zip(ARMS, found, strict=True))
            gain = 100 * (named[WITH] / named[WITHOUT] - 1)
            lines.append(
                f"| {load} | {100 * share:.4g}% | {seed_name} | {' | '.join(f'{n:,}' for n in found)} | {gain:+.2f}% |"
            )
    return "\n".join(lines)


def told_apart(first_asks: Sequence[FirstAsk], feature: Callable[[FirstAsk], float]) -> float:
    """How often a document that comes back has more than one that does not: 0.5 is chance."""
    back = np.array([feature(ask) for ask in first_asks if ask.returns])
    gone = np.array([feature(ask) for ask in first_asks if not ask.returns])
    above, equal = back[:, None] > gone, back[:, None] == gone
    return float((above + 0.5 * equal).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", nargs="*", choices=LOADS, default=["absent"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.125, 0.25, 0.5], help="of the blocks that a load touches"
    )
    parser.add_argument("--sessions", type=int, default=LoadShape.sessions)
    parser.add_argument("--documents", type=int, default=LoadShape.documents, help="that come back")
    parser.add_argument("--shortest", type=int, default=LoadShape.shortest, help="document, in tokens")
    parser.add_argument("--longest", type=int, default=LoadShape.longest)
    parser.add_argument("--computed", action="store_true", help="have the model compute every step of every arm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.shortest < 256:
        parser.error(f"--shortest {options.shortest}: documents need 256 tokens to have blocks between their ends")
    torch.set_num_threads(1)
    shape = LoadShape(
        sessions=options.sessions, documents=options.documents, shortest=options.shortest, longest=options.longest
    )
    outcomes, first_asks = evaluate(options, shape)
    print(f"\nprompt tokens found in the cache\n\n{table(outcomes)}\n")
    print("first requests for documents: does the mass of their blocks tell those that come back? (0.5 is chance)\n")
    print("| load | come back, do not | mean mass | highest | mean on the level of 1 |\n" + "| --- " * 5 + "|")
    for load in options.loads:
        some = [ask for ask in first_asks if ask.load == load]
        back = sum(ask.returns for ask in some)
        mean, peak = told_apart(some, lambda ask: ask.mean), told_apart(some, lambda ask: ask.peak)
        level = fmean(attention_level(ask.mean) == attention_level(1.0) for ask in some)
        print(f"| {load} | {back}, {len(some) - back} | {mean:.2f} | {peak:.2f} | {level:.0%} |")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"outcomes": [asdict(o) for o in outcomes], "first_asks": [asdict(ask) for ask in first_asks]}
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
