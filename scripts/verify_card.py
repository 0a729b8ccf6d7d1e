"""Builds TensorRT engines on a machine with a card, compares them with PyTorch's executor, times both, prints a table.

    scripts/verify_gpu.sh                                    # the demo model, in all precisions that the card has
    scripts/verify_gpu.sh --model models/gemma-3-27b --precision int4
    scripts/verify_gpu.sh --rehearse                         # without a card: builds, and computes by ONNX Runtime

Exit code: 0 when all could be compared and agrees; 1 when something does not; 2 when the machine lacks something, which
is named.
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.card_check.engine_runs import Run, equal_tokens, run
from scripts.card_check.requirements import machine, missing
from scripts.card_check.segments import Results, results, worst_errors
from scripts.quantize import Scheme, fp8, int4, quantize
from wicore_backend.config import EngineConfig
from wicore_backend.engine.executor_loading import load_executor
from wicore_backend.engine.executors import choose, computing_type, find_engines
from wicore_backend.errors import WicoreError
from wicore_backend.executor.segments.contract import Precision, SegmentKind
from wicore_backend.executor.tensorrt.card import CudaCard
from wicore_backend.executor.tensorrt.library import LibraryName, load_library
from wicore_backend.models.gemma3.config import Gemma3Config

DEMO = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
_REHEARSED = "sm89"
_TOKENS = (1, 16, 200)
"""Of the steps in which segments are compared: one decode, many, and a prompt's chunk."""
_BATCHES = (1, 8)
_DEMO_GROUP = 64
"""Inputs that share a scale: the largest group that divides the demo model's matrices."""
_TOLERANCE: Mapping[Precision, float] = {
    Precision.FP32: 1e-4,
    Precision.FP16: 1e-2,
    Precision.BF16: 5e-2,
    Precision.INT4: 5e-2,
    Precision.FP8: 1e-1,
}
"""Of a segment's results, in parts of the largest: where both round differently, and where something is wrong."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in a precision.

    Attributes
    ----------
    scheme
        If the checkpoint is to be made first, of the demo model.
    """

    name: str
    model: Path
    precision: Precision
    scheme: Scheme | None = None

    def make(self) -> None:
        """Write the checkpoint, if it is to be made.

        Raises
        ------
        CheckpointError
            If it cannot be, for want of room for example.
        """
        if self.scheme is not None:
            quantize(DEMO, self.model, self.scheme, device=torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found out about a subject.

    Attributes
    ----------
    errors
        Of segments, the largest of each kind.
    """

    build_s: float
    engine_gb: float
    errors: Mapping[SegmentKind, float]
    candidate: Run
    reference: Run


def check(subject: Subject, *, engines: Path, kept: bool, rehearse: bool, target: str) -> Outcome:
    """Make, build, compare and time one subject.

    Parameters
    ----------
    kept
        The engines stay, so that it is said how they are served.

    Raises
    ------
    WicoreError
        If something cannot be built or run.
    """
    subject.make()
    began = time.monotonic()
    _build(subject, engines, target, told=kept)
    build_s = time.monotonic() - began
    size = sum(path.stat().st_size for path in engines.rglob("*.engine"))
    settings: dict[str, Any] = {
        "model": subject.model,
        "max_running": max(_BATCHES),
        "max_batch_tokens": 512,
        "max_model_len": 1024,
        "prefix_cache": False,
        "host_cache_bytes": 0,
        "max_guessed_tokens": 0,
    }
    # PyTorch's float16 overflows where these engines do not; and on a CPU ONNX Runtime multiplies no bfloat16.
    exact = rehearse or subject.precision in (Precision.FP16, Precision.FP32)
    reference = EngineConfig(**settings, executor="torch", dtype="float32" if exact else "auto")
    if rehearse:
        candidate = EngineConfig(**settings, executor="onnx", engines=engines)
    else:
        candidate = EngineConfig(
            **settings, executor="tensorrt", engines=engines, engine_precision=subject.precision.value
        )
    expected, found = _segments(reference), _segments(candidate)
    errors = worst_errors(found, expected)
    runs = []
    for settings_of in (candidate, reference):
        runs.append(run(settings_of, batches=_BATCHES, prompt=768, new=32, rounds=1 if rehearse else 5))
        _give_back()
    return Outcome(build_s, size / 1e9, errors, *runs)


def _build(subject: Subject, engines: Path, target: str, *, told: bool) -> None:
    library = "tensorrt" if load_library().name is LibraryName.TENSORRT else "rtx"
    command = [sys.executable, "-m", "scripts.build_engines", str(subject.model), "--engines", str(engines)]
    command += ["--target", target, "--precision", str(subject.precision), "--library", library]
    command += ["--max-running", str(max(_BATCHES)), "--max-batch-tokens", "512"]
    if subprocess.run(command, check=False, stdout=sys.stderr if told else subprocess.DEVNULL).returncode:
        raise WicoreError(f"{subject.name} {subject.precision} could not be built for {target}: see above")


def _segments(settings: EngineConfig) -> Results:
    config = Gemma3Config.from_checkpoint(settings.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose(settings.executor, device, find=partial(find_engines, settings, config, device))
    loaded = load_executor(
        choice,
        settings,
        config,
        device=device,
        dtype=computing_type(choice, settings, device),
        reserved_bytes=lambda: 0,
    )
    given = results(loaded.executor, config, _TOKENS)
    del loaded
    _give_back()
    return given


def _give_back() -> None:
    """Leave the device to whoever is next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(there: Mapping[str, str], outcomes: Sequence[tuple[Subject, Outcome | str]]) -> str:
    """All that was found out, as Markdown; a text in place of an outcome says why there is none."""
    lines: list[tuple[str, Callable[[Subject, Outcome], str]]] = [
        ("built in, s", lambda _, o: f"{o.build_s:.0f}"),
        ("engines, GB", lambda _, o: f"{o.engine_gb:.2f}"),
        *((f"error of {kind}", partial(_error, kind)) for kind in SegmentKind),
        ("equal tokens, greedy", lambda _, o: "{} of {}".format(*equal_tokens(o.candidate, o.reference))),
        *((f"step of {batch}, ms (torch)", partial(_step, batch)) for batch in _BATCHES),
        ("prompt, tokens/s (torch)", _prompt),
    ]
    rows = [["", *(f"{subject.name} {subject.precision}" for subject, _ in outcomes)]]
    for name, cell in lines:
        rows.append([name, *("-" if isinstance(out, str) else cell(subject, out) for subject, out in outcomes)])
    rows.append(["verdict", *(_verdict(subject, outcome) for subject, outcome in outcomes)])
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    versions = [f"| {name} | {value} |" for name, value in there.items()]
    return "\n".join(["| | |", "|---|---|", *versions, "", head, "|---" * len(rows[0]) + "|", *rest])


def _verdict(subject: Subject, outcome: Outcome | str) -> str:
    if isinstance(outcome, str):
        return " ".join(f"FAILED: {outcome}".replace("|", "/").split())
    return "agrees" if agrees(subject, outcome) else "DIFFERS"


def _prompt(_: Subject, outcome: Outcome) -> str:
    return f"{outcome.candidate.speeds.prefill:,.0f} ({outcome.reference.speeds.prefill:,.0f})"


def _error(kind: SegmentKind, _: Subject, outcome: Outcome) -> str:
    return f"{outcome.errors[kind]:.1e}" if kind in outcome.errors else "-"


def _step(batch: int, _: Subject, outcome: Outcome) -> str:
    return f"{outcome.candidate.speeds.step_ms[batch]:.2f} ({outcome.reference.speeds.step_ms[batch]:.2f})"


def agrees(subject: Subject, outcome: Outcome) -> bool:
    """Whether all segments are as near to PyTorch's as their types allow."""
    return all(error <= _TOLERANCE[subject.precision] for error in outcome.errors.values())


def _subjects(args: argparse.Namespace, target: str, scratch: Path) -> Iterator[Subject]:
    """The demo model in what the card has, and the checkpoint that was asked for.

    In INT4 and FP8 the demo model is quantised first, so that both executors compute from the same numbers.
    """
    if args.rehearse:
        yield Subject("wicore-demo", DEMO, Precision.BF16)
        return
    number = int(target.removeprefix("sm"))
    if number < 80:
        yield Subject("wicore-demo", DEMO, Precision.FP16)
    else:
        yield Subject("wicore-demo", DEMO, Precision.BF16)
        for precision, scheme in ((Precision.INT4, int4(_DEMO_GROUP)), (Precision.FP8, fp8())):
            if precision is Precision.INT4 or number >= 89:
                yield Subject("wicore-demo", scratch / f"demo-{precision}", precision, scheme)
    if args.model:
        yield Subject(args.model.resolve().name, args.model, Precision(args.precision))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint besides the demo model")
    parser.add_argument("--precision", choices=[str(p) for p in Precision], default="bf16", help="for --model")
    parser.add_argument("--engines", type=Path, help="where the engines of --model are, and stay (default: dropped)")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a card: engines are built, ONNX Runtime computes"
    )
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.engines and not args.model:
        parser.error("--engines is for those of --model; name that, too")
    if args.rehearse and args.model:
        parser.error("--rehearse is of the demo model alone; leave --model out")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not args.rehearse and (problems := missing()):
        print("This machine cannot run TensorRT engines:", *problems, sep="\n- ")
        raise SystemExit(2)
    target = _REHEARSED if args.rehearse else CudaCard.of(torch.device("cuda")).compute_capability
    outcomes: list[tuple[Subject, Outcome | str]] = []
    with tempfile.TemporaryDirectory(prefix="wicore-verify-") as scratch:
        for subject in _subjects(args, target, Path(scratch)):
            own = args.engines if subject.model == args.model else None
            engines = own or Path(scratch) / f"engines-{len(outcomes)}"
            print(f"{subject.name} in {subject.precision} ...", file=sys.stderr)
            try:
                outcome = check(subject, engines=engines, kept=own is not None, rehearse=args.rehearse, target=target)
            except (WicoreError, RuntimeError) as error:  # The latter are PyTorch's and CUDA's.
                outcomes.append((subject, str(error)))
            else:
                outcomes.append((subject, outcome))
    print(table(machine(), outcomes))
    agree = all(not isinstance(outcome, str) and agrees(subject, outcome) for subject, outcome in outcomes)
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
