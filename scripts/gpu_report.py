"""Measures on a card what Gemma-3-27B is to reach on it: a table of goals and figures, with the command of each.

    python -m scripts.gpu_report                                    # everything: 14 minutes on an H200, 25 at most
    python -m scripts.gpu_report --parts bf16 fp8 int4 --seconds 150
    python -m scripts.gpu_report --parts                            # the table of what was measured before
    python -m scripts.gpu_report --rehearse                         # without a card, at shapes that a CPU computes

Each part runs in processes of its own with a time limit, and what it gives is saved at once, so that one that fails or
is cut off leaves the others and says why. What earlier commands saved in the same directory is in the table as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.gpu_figures.goals import GOALS, Goal
from scripts.gpu_figures.parts import PARTS
from scripts.gpu_figures.running import Report, Run, left_out, measure, saved

_LEAST_S = 15.0
"""With less time left nothing is begun."""


def take(runs: Sequence[Run], directory: Path, *, scratch: Path, rehearse: bool, seconds: float | None) -> list[Report]:
    """Run them one after the other, in `seconds` if that is not None; tells each end on standard error."""
    until = None if seconds is None else time.monotonic() + seconds
    reports = []
    for run in runs:
        left = run.limit_s if until is None else min(run.limit_s, until - time.monotonic())
        if left < min(_LEAST_S, run.limit_s):
            report = left_out(run, directory, f"{max(0.0, left):.0f} s were left")
        else:
            report = measure(run, directory, scratch=scratch, rehearse=rehearse, limit_s=left)
        reports.append(report)
        print(f"{report.name}: {report.ending} in {report.seconds} s. {report.why}", file=sys.stderr, flush=True)
    return reports


def environment(reports: Mapping[str, Report]) -> str:
    """The machine, and the card and its read limit as the runs found them."""
    import torch

    said = [f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs", f"Python {platform.python_version()}"]
    said += [f"PyTorch {torch.__version__}", time.strftime("%Y-%m-%d")]
    results = [report.result["result"] for report in reports.values() if _has_result(report)]
    for key, words in (("device", "{}"), ("driver", "driver {}"), ("read_limit_tb_s", "read limit {} TB/s")):
        values = dict.fromkeys(str(result[key]) for result in results if key in result)
        said += [words.format(" and ".join(values))] if values else []
    return "; ".join(said)


def _has_result(report: Report) -> bool:
    return isinstance(report.result, Mapping) and isinstance(report.result.get("result"), Mapping)


def table(reports: Mapping[str, Report], goals: Sequence[Goal] = GOALS) -> str:
    """The goals and the figures, in Markdown; of a figure that is not there, why."""
    lines = ["| | goal | figure | |", "|---|---|---|---|"]
    for goal in goals:
        figure = goal.figure(reports)
        lines.append(f"| {goal.what} | {goal.wanted} | {_told(goal, figure, reports.get(goal.run))} |")
    commands = [f"- {name}: `{report.command}`" for name, report in reports.items()]
    return "\n".join([*lines, "", environment(reports), "", *commands])


def _told(goal: Goal, figure: float | None, report: Report | None) -> str:
    """A figure and its verdict, as two cells; of one that is not there, why."""
    if report is None:
        return "not measured |"
    if report.rehearsed:
        return f"rehearsed, {report.ending} |"
    if figure is None:
        return f"{report.ending}: {report.why or 'it is not in the result'}"[:160].replace("|", "/") + " |"
    verdict = {True: " met", False: " **not met**", None: ""}[goal.met(figure)]
    return f"{figure:,.4g} {goal.unit}".strip() + " |" + verdict


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--seconds", type=float, help="for all parts together; those for which none are left are left out"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-report"), help="the directory of results")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the disk to measure"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--plan", action="store_true", help="what would be run, and how long it takes; runs nothing")
    args = parser.parse_args(arguments)
    runs = [run for part in args.parts for run in PARTS[part]]
    if args.plan:
        for run in runs:
            print(f"{run.name:<12}{run.expected_s:>5.0f} s, at most {run.limit_s:.0f}: {' '.join(run.arguments)}")
        print(f"{'':<12}{sum(run.expected_s for run in runs):>5.0f} s")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    reports = take(runs, args.out, scratch=args.scratch, rehearse=args.rehearse, seconds=args.seconds)
    print(table(saved(args.out)))
    return 0 if all(report.ending == "done" for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
