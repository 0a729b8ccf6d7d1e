"""A scheduler to turn by hand, and sequences for it. A step computes nothing and takes a second."""

from __future__ import annotations

import numpy as np

from wicore_backend.engine.plan import Rejected, SchedulerCounts, SchedulerLimits, StepPlan
from wicore_backend.engine.request import Deadlines, PriorityClass, Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.processor.prompt import Prompt, PromptImage

REALTIME, INTERACTIVE, BATCH = PriorityClass.REALTIME, PriorityClass.INTERACTIVE, PriorityClass.BATCH
_SCHEME = NameScheme(4)


def sequence(
    prompt: int,
    answer: int = 10,
    *,
    images=(),
    priority: int = INTERACTIVE,
    arrival: float = 0.0,
    first: int = 0,
    tenant: str = "",
    deadlines: Deadlines | None = None,
    named: bool = True,
) -> Sequence:
    """A sequence whose prompt has tokens `first`, `first` + 1, ...; the same `first` and length are the same prompt."""
    spans = tuple(PromptImage(start, length, np.zeros((3, 1, 1), np.uint8), b"") for start, length in images)
    tokens = Prompt(np.arange(first, first + prompt, dtype=np.int32), spans)
    params = SamplingParams()
    request = Request("r", tokens, params, lambda _: None, arrival, priority, tenant, deadlines or Deadlines())
    made = Sequence(request, max_tokens=prompt + answer)
    if named:
        made.names = BlockNames(_SCHEME, made.tokens, spans, tenant)
        made.twin_key = made.names.whole(prompt)
    return made


class Bench:
    """A scheduler, and a clock that a step moves by a second."""

    def __init__(
        self, *, budget: int = 16, running: int = 4, blocks: int = 1000, lower: LowerTiers | None = None, **limits
    ) -> None:
        groups = [LayerGroup.LOCAL, LayerGroup.GLOBAL]
        layout = KVLayout.of(groups, block_size=4, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
        self.books = BlockManager(layout, dict.fromkeys(LayerGroup, blocks + 1), max_chunk=budget, lower=lower)
        self.step_time = StepTimeModel()
        self.now = 0.0
        self.latest: StepPlan | None = None
        self.scheduler = Scheduler(
            self.books, SchedulerLimits(max_batch_tokens=budget, max_running=running, **limits), self.step_time
        )

    def add(self, *sequences: Sequence) -> list[Rejected]:
        rejected = [r for s in sequences for r in self.scheduler.add(s, self.now)]
        self.scheduler.check_integrity()
        return rejected

    def step(self) -> list[tuple[Sequence, int, int]]:
        """One step; every sequence that is complete so far gets a token, and ends when it is as long as it may be."""
        plan = self.latest = self.scheduler.plan(self.now)
        self.scheduler.check_integrity()
        done = [(s, s.computed, s.computed + 1) for s in plan.decodes] + [
            (c.sequence, c.start, c.end) for c in plan.chunks
        ]
        ready = [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]
        ready += [fork.sequence for fork in self.scheduler.complete(plan)]
        for s in ready:
            s.tokens.append(7)
            if len(s.tokens) >= s.max_tokens:
                self.scheduler.finished(s)
        self.scheduler.check_integrity()
        self.now += 1
        return done

    def run(self, limit: int = 3000) -> int:
        """Steps until nothing is left."""
        for n in range(limit):
            if not self.scheduler.has_work:
                return n
            assert self.step(), "work, but an empty step"
        raise AssertionError("it does not end")

    @property
    def counts(self) -> SchedulerCounts:
        return self.scheduler.counts

    def teach(self, *, step: float, token: float, mixed: float = 0.0) -> None:
        """Let the step-time model learn a machine."""
        for n in range(200):
            sequences, prefill = n % 7 + 1, (n % 5) * 20
            shape = StepShape(sequences, sequences, sequences * 30, 0)
            if prefill:
                shape = shape.with_prefill(prefill, 0)
            self.step_time.observe(shape, step + token * shape.tokens + mixed * shape.mixed)
