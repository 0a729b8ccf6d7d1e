"""Replays traces of production chat services through the engine's Scheduler, on a model of one H200.

    python -m scripts.simulate --trace AzureLLMInferenceTrace_conv.csv --trace mooncake_conversation_trace.jsonl
    python -m scripts.simulate --minutes 10 --loads 1 2 --json build/simulation.json

For each trace it measures the capacity, replays the trace at shares of it, and then lets batch work saturate the
machine beside realtime requests. Exit code 1 if a target is missed: goodput at the highest load at least 90% of that at
load 1, the 99th percentile of realtime requests' queue time under 5 steps, every request ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from scripts.simulation.machine import Machine
from scripts.simulation.replay import Arrival, Replay, Replayed, RequestClass
from scripts.simulation.summary import COLUMNS, Summary, print_table, rows, summarize
from scripts.simulation.traces import Trace, find_traces, read_trace
from wicore_backend.engine.plan import SchedulerLimits
from wicore_backend.engine.request import PriorityClass

GOODPUT_KEPT = 0.9
"""Target: goodput at the highest load, of that at capacity."""
REALTIME_QUEUE_STEPS = 5
"""Target: 99 of 100 realtime requests are computed in fewer steps after they came."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a simulation assumes beside the trace.

    Attributes
    ----------
    target_tpot_s
        What the scheduler aims at.
    good_tpot_s
        What counts as good: the scheduler controls means, and steps are noisy.
    """

    machine: Machine
    classes: tuple[RequestClass, ...]
    limits: SchedulerLimits
    good_tpot_s: float
    max_answer: int
    seed: int


class Simulation:
    """The runs over one trace."""

    def __init__(self, trace: Trace, setting: Setting) -> None:
        self._trace = trace
        self._setting = setting
        random = Random(setting.seed)
        shares = [c.share for c in setting.classes]
        self._classes = random.choices(setting.classes, shares, k=len(trace.requests))

    def capacity(self) -> float:
        """Requests a second that the machine finishes while 64 more always wait, in the trace's order.

        All are of one class and without deadlines, so that nothing is turned away; the first and the last tenth of
        the answers are not counted, when the batch fills and empties.
        """
        plain = RequestClass("any", PriorityClass.INTERACTIVE, 1.0)
        replayed = self._replay(backlog=[Arrival(0.0, r, plain) for r in self._trace.requests])
        ends = sorted(r.ended for r in replayed.records if r.ended is not None)
        first, last = len(ends) // 10, len(ends) * 9 // 10
        return (last - first) / (ends[last] - ends[first])

    def at_load(self, load: float, capacity: float) -> Summary:
        """The whole trace, its time stretched so that requests come at `load` times the capacity."""
        stretch = self._trace.rate / (load * capacity)
        arrivals = [
            Arrival(r.arrival_s * stretch, r, c) for r, c in zip(self._trace.requests, self._classes, strict=True)
        ]
        began = time.perf_counter()
        return summarize(self._replay(arrivals=arrivals), self._setting.good_tpot_s, load, time.perf_counter() - began)

    def batch_saturated(self, capacity: float) -> Summary:
        """Requests of the first class at their share of the capacity, while 64 of the last class always wait.

        The last class has no deadlines here; the run ends with the requests of the first one.
        """
        urgent, lowest = self._setting.classes[0], replace(self._setting.classes[-1], first_token_s=None)
        chosen = [r for r, c in zip(self._trace.requests, self._classes, strict=True) if c is urgent]
        others = [r for r, c in zip(self._trace.requests, self._classes, strict=True) if c is not urgent]
        stretch = self._trace.rate / capacity
        last = chosen[-1].arrival_s * stretch

        def backlog() -> Iterator[Arrival]:
            for request in cycle(others):
                if replay.now > last:
                    return
                yield Arrival(0.0, request, lowest)

        replay = self._make(arrivals=[Arrival(r.arrival_s * stretch, r, urgent) for r in chosen], backlog=backlog())
        began = time.perf_counter()
        return summarize(replay.run(), self._setting.good_tpot_s, urgent.share, time.perf_counter() - began)

    def _make(self, *, arrivals: Iterable[Arrival] = (), backlog: Iterable[Arrival] = ()) -> Replay:
        return Replay(
            self._setting.machine,
            self._setting.limits,
            block_size=self._trace.block_size,
            arrivals=arrivals,
            backlog=backlog,
            max_answer=self._setting.max_answer,
            seed=self._setting.seed,
        )

    def _replay(self, *, arrivals: Iterable[Arrival] = (), backlog: Iterable[Arrival] = ()) -> Replayed:
        return self._make(arrivals=arrivals, backlog=backlog).run()


def meets_targets(summaries: Sequence[Summary], saturated: Summary, urgent: str) -> dict[str, bool]:
    """Which targets the runs over one trace meet."""
    by_load = {s.load: s for s in summaries}
    queue_steps = saturated.classes[urgent].queue_p99_steps
    met = {
        f"realtime p99 queue time under {REALTIME_QUEUE_STEPS} steps while batch saturates": queue_steps is not None
        and queue_steps < REALTIME_QUEUE_STEPS,
        "every request ends": not any(s.unended for s in (*summaries, saturated)),
    }
    most = max(by_load)
    if 1.0 in by_load and most > 1:
        kept = by_load[most].goodput_per_s / by_load[1.0].goodput_per_s
        met[f"goodput at {most:g} at least {GOODPUT_KEPT:.0%} of that at 1"] = kept >= GOODPUT_KEPT
    return met


def simulate(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs over one trace, printed as they end."""
    trace = read_trace(path)
    if args.minutes is not None:
        trace = trace.first(60 * args.minutes)
    setting = setting_of(args, scale=args.long_prompt_patience if trace.block_size else 1.0)
    simulation = Simulation(trace, setting)
    began = time.perf_counter()
    capacity = simulation.capacity()
    print(f"\n{trace.name}: {len(trace.requests)} requests, capacity {capacity:.3f} requests/s", flush=True)
    table: list[tuple[str, ...]] = [COLUMNS]
    summaries = []
    for load in args.loads:
        summaries.append(simulation.at_load(load, capacity))
        table += rows(summaries[-1], f"{load:g}")
    saturated = simulation.batch_saturated(capacity)
    table += rows(saturated, "batch saturates")
    print_table(table)
    met = meets_targets(summaries, saturated, setting.classes[0].name)
    for target, is_met in met.items():
        print(f"{'met' if is_met else 'MISSED'}: {target}")
    return {
        "trace": trace.name,
        "requests": len(trace.requests),
        "capacity_per_s": capacity,
        "deadlines_s": {c.name: c.first_token_s for c in setting.classes},
        "loads": [asdict(s) for s in summaries],
        "batch_saturated": asdict(saturated),
        "targets": met,
        "wall_s": time.perf_counter() - began,
    }


def setting_of(args: argparse.Namespace, *, scale: float = 1.0) -> Setting:
    """The setting that the options describe, its deadlines multiplied by `scale`."""
    names = zip(PriorityClass, args.shares, args.deadlines, strict=True)
    return Setting(
        machine=Machine(noise=args.noise),
        classes=tuple(
            RequestClass(c.name.lower(), c, share, scale * deadline, args.deadline_per_1k)
            for c, share, deadline in names
        ),
        limits=SchedulerLimits(
            max_batch_tokens=args.max_batch_tokens,
            max_running=args.max_running,
            target_tpot_s=args.target_tpot_ms / 1000,
        ),
        good_tpot_s=args.good_tpot_ms / 1000,
        max_answer=args.max_answer,
        seed=args.seed,
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", help="file; the default is those in a folder traces/")
    parser.add_argument("--minutes", type=float, help="only the beginning of each trace")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="shares of the capacity")
    three = partial(parser.add_argument, type=float, nargs=3, metavar=("REALTIME", "INTERACTIVE", "BATCH"))
    three("--shares", default=[0.1, 0.6, 0.3], help="of the classes in the requests")
    three("--deadlines", default=[1.0, 5.0, 60.0], help="seconds to the first token")
    parser.add_argument("--deadline-per-1k", type=float, default=0.25, help="and so many for 1,000 tokens of prompt")
    parser.add_argument(
        "--long-prompt-patience",
        type=float,
        default=6.0,
        help="multiplies the deadlines for Mooncake's trace, whose prompts are ten times as long",
    )
    parser.add_argument("--target-tpot-ms", type=float, default=50.0, help="what the scheduler aims at")
    parser.add_argument("--good-tpot-ms", type=float, default=60.0, help="what counts as good")
    parser.add_argument("--max-answer", type=int, default=4096, help="max_tokens of each request")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.03, help="of step times, relative")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def main() -> int:
    args = parser().parse_args()
    paths = args.trace or find_traces()
    if not paths:
        print(
            "no traces found beside the repository; name one with --trace (docs/benchmarks/scheduler.md says where "
            "to get them)",
            file=sys.stderr,
        )
        return 2
    results = [simulate(path, args) for path in paths]
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "results": results}, indent=2, default=str))
    return 0 if all(all(result["targets"].values()) for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
