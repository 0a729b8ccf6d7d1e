"""Builds the TensorRT engines of a Gemma-3 checkpoint, one for each dense segment, with or without a GPU.

    python -m scripts.build_engines models/gemma-3-27b --plan rtx4090-27b
    python -m scripts.build_engines models/gemma-3-27b --target sm89 --precision int4 --library rtx --max-running 8
    python -m scripts.build_engines models/gemma-3-27b --plan rtx4090-27b --dry-run    # what it would take
    python -m scripts.build_engines models/gemma-3-27b --inspect                       # what there is

A segment is exported to ONNX and built, and its ONNX file dropped, before the next one's turn. A run that ends, in
whatever way, is gone on with by the same command. TensorRT-RTX (`--library rtx`) builds for any card that it runs on;
TensorRT (`--library tensorrt`) for the card that is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from wicore_backend.config import EngineConfig
from wicore_backend.devices.cards import CARDS
from wicore_backend.devices.plans import PLANS, Plan
from wicore_backend.engine.executors import engines_directory
from wicore_backend.errors import CheckpointError, InvalidArgumentError, WicoreError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.tensorrt.building import BuildOptions
from wicore_backend.executor.tensorrt.library import Library, LibraryName, load_library
from wicore_backend.executor.tensorrt.profiles import MAX_IMAGES, profiles_for
from wicore_backend.executor.tensorrt.records import EngineKey
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.models.gemma3.weight_format import weight_format
from wicore_backend.sizes import gib

try:
    from scripts.engine_build.builder import Build, Limits
    from scripts.engine_build.estimates import Part, parts
    from scripts.engine_build.tables import Inspection, duration, inspection, plan_table
    from scripts.engine_build.worker import Built
except ModuleNotFoundError as missing:  # Its words say what to install.
    raise SystemExit(f"build_engines: {missing}") from None

_LIBRARIES = {"rtx": LibraryName.TENSORRT_RTX, "tensorrt": LibraryName.TENSORRT}

_log = logging.getLogger("build_engines")


class _Report:
    """Tells how far a build is: a bar on a terminal, elsewhere a line for each engine."""

    def __init__(self, todo: Sequence[Part]) -> None:
        self._total = sum(part.engine_bytes for part in todo)
        self._left = len(todo)
        self._done = 0
        self._began = time.monotonic()
        self._running: list[str] = []
        self._bar = tqdm(total=self._total, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def began(self, part: Part) -> None:
        self._running.append(part.name)
        self._show()

    def ended(self, part: Part, built: Built) -> None:
        self._running.remove(part.name)
        self._done += part.engine_bytes
        self._left -= 1
        rate = self._done / (time.monotonic() - self._began)
        said = (
            f"{part.name}: {built.record.nbytes / 2**20:,.1f} MiB in {built.export_s:.1f} + {built.build_s:.1f} s, "
            f"{built.peak_bytes / 2**30:.2f} GiB of memory"
        )
        if self._bar is None:
            left = duration((self._total - self._done) / rate)
            _log.info("%s; %d left, %.1f MB/s, %s", said, self._left, rate / 1e6, left)
            return
        self._bar.write(said, file=sys.stderr)
        self._bar.update(part.engine_bytes)
        self._show()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_description(" ".join(self._running) or "done")


def _key(args: argparse.Namespace, plan: Plan | None, library: Library, *, fingerprint: str) -> EngineKey:
    settings = plan.engine_config(args.model) if plan else EngineConfig(model=args.model)
    timed_on = torch.cuda.get_device_name() if library.times_kernels and torch.cuda.is_available() else None
    return EngineKey(
        model=fingerprint,
        precision=Precision(args.precision),
        weights=args.weights,
        library=library.name,
        version=library.version,
        compute_capability=args.target,
        card=timed_on,
        profiles=profiles_for(
            max_running=args.max_running or settings.max_running,
            max_batch_tokens=args.max_batch_tokens or settings.max_batch_tokens,
            max_images=args.max_images,
        ),
        weight_streaming=args.weight_streaming,
        searched=not args.no_search and args.precision == Precision.INT4,
    )


def build_engines(args: argparse.Namespace) -> str:
    """What the command does; returns what it says at the end.

    Raises
    ------
    WicoreError
        If the checkpoint, the library, the machine or what was asked for will not do.
    """
    plan = PLANS[args.plan] if args.plan else None
    config = Gemma3Config.from_checkpoint(args.model)
    if plan is not None:
        _check_plan(plan, config, args.model)
    library = load_library(_LIBRARIES[args.library].value)
    if library.builds_for_other_cards:
        library.target(args.target)
    if library.times_kernels and args.jobs > 1:
        raise InvalidArgumentError(
            f"--jobs {args.jobs}: {library} times kernels, and wants the card for itself; leave it out"
        )
    precision = Precision(args.precision)
    _check_precision(args.target, precision)
    searched = precision is Precision.INT4 and not args.no_search and weight_format(args.model) is None
    todo = parts(config, precision, args.weights, searched=searched)
    fingerprint = _fingerprint(args.model)
    root = engines_directory(_settings(args), fingerprint=fingerprint)
    build = Build(
        args.model,
        root,
        _key(args, plan, library, fingerprint=fingerprint),
        todo,
        options=BuildOptions(
            weight_streaming=args.weight_streaming,
            optimization_level=args.optimization_level,
            threads=args.threads,
        ),
        keep_onnx=args.keep_onnx,
        replace=args.replace,
    )
    missing = build.missing()
    limits = Limits(args.jobs, args.memory)
    if args.dry_run:
        table = plan_table(missing, todo, root=root, jobs=args.jobs, keep_onnx=args.keep_onnx)
        print(table)
        build.check(missing, limits)
        return f"{build.directory}: nothing was built"
    began, report = time.monotonic(), _Report(missing)
    try:
        build.run(missing, limits, report.began, report.ended)
    finally:
        report.close()
    took = duration(time.monotonic() - began)
    return (
        f"{build.directory}: {len(missing)} engines built in {took}, {len(todo)} are there\n"
        f"serve them: {_serve(args, plan)}"
    )


def inspect_engines(args: argparse.Namespace) -> Inspection:
    """What `--inspect` prints.

    Raises
    ------
    WicoreError
        If the checkpoint cannot be read, after which the engines' directory is named where none is given.
    """
    fingerprint = None if args.engines else _fingerprint(args.model)
    return inspection(engines_directory(_settings(args), fingerprint=fingerprint))


def _settings(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(model=args.model, engines=args.engines)


def _fingerprint(model: Path) -> str:
    """The checkpoint's, in hexadecimal, which takes a second for a large one."""
    try:
        return checkpoint_fingerprint(model).hex()
    except OSError as error:
        raise CheckpointError(f"{model} cannot be read: {error}; name the directory of a checkpoint") from None


def _check_precision(target: str, precision: Precision) -> None:
    """Refuse what no card with this compute capability multiplies, of those that are known, before it is exported."""
    cards = [card for card in CARDS.values() if card.compute_capability == target]
    able = frozenset[Precision]().union(*(card.precisions for card in cards))
    if cards and precision not in able:
        raise InvalidArgumentError(
            f"--precision {precision}: {cards[0].name} ({target}) multiplies {', '.join(sorted(able))} only; take that"
        )


def _check_plan(plan: Plan, config: Gemma3Config, model: Path) -> None:
    positions = config.text.max_position_embeddings
    if (wanted := plan.settings.get("max_model_len", 0)) > positions:
        raise InvalidArgumentError(
            f"--plan {plan.name} is for {plan.model}, with sequences of {wanted:,} tokens, and {model.name} "
            f"has {positions:,} positions; take another plan, or --target, --precision and --max-running by hand"
        )
    memory = plan.memory(config, model)
    context = memory.settings.context(config.text.max_position_embeddings)
    if memory.longest < context:
        raise InvalidArgumentError(
            f"--plan {plan.name} is for {plan.model}, and {model.name} leaves the KV cache "
            f"{gib(memory.kv_cache)} GiB of {plan.card.name}, not enough for {context:,} tokens; take another "
            "plan, or --target, --precision and --max-running by hand"
        )


def _serve(args: argparse.Namespace, plan: Plan | None) -> str:
    settings = dict(plan.serving_settings) if plan else {"executor": "tensorrt", "engine_precision": args.precision}
    if args.engines:
        settings["engines"] = args.engines.resolve()
    if args.max_running:
        settings["max_running"] = args.max_running
    if args.max_batch_tokens:
        settings["max_batch_tokens"] = args.max_batch_tokens
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={_as_text(value)}")]
    return shlex.join(["scripts/serve.sh", "--model", str(args.model), *given])


def _as_text(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Gemma-3 checkpoint, plain or quantised")
    parser.add_argument(
        "--engines", type=Path, help="where they go, and are looked for by a server (default: in ~/.cache/wicore)"
    )
    parser.add_argument("--plan", choices=PLANS, help="ready-made settings for a card: docs/operations.md")
    parser.add_argument("--target", metavar="smXX", help="the card's compute capability: sm75, sm89, sm90, ...")
    parser.add_argument("--precision", choices=[str(precision) for precision in Precision])
    parser.add_argument("--library", choices=_LIBRARIES)
    parser.add_argument("--max-running", type=_positive, help="sequences at once, as it will be served")
    parser.add_argument("--max-batch-tokens", type=_positive, help="tokens of a step, as it will be served")
    parser.add_argument(
        # Of 1 the library makes an engine for exactly that, which contexts and the contract do not take.
        "--max-images",
        type=_several,
        default=MAX_IMAGES,
        help="pictures that are encoded at once, 2 or more",
    )
    parser.add_argument(
        "--weights", choices=["embedded", "inputs"], default="embedded", help="in the engines, or given to them"
    )
    parser.add_argument(
        "--weight-streaming", action="store_true", help="weights may stay in host memory; slow, for small cards"
    )
    parser.add_argument("--optimization-level", type=int, choices=range(6), help="of TensorRT: more takes longer")
    parser.add_argument(
        "--no-search", action="store_true", help="round to INT4 in a tenth of the time, with more error"
    )
    parser.add_argument("--jobs", type=_positive, default=1, help="engines that are built at once")
    parser.add_argument("--threads", type=_positive, default=1, help="of one build")
    parser.add_argument("--memory", type=_gib, metavar="GiB", help="that builds may take (default: what is free)")
    parser.add_argument("--keep-onnx", action="store_true", help="keep the ONNX files, for other cards and libraries")
    parser.add_argument(
        "--replace", action="store_true", help="give up engines of another model or other settings that are there"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be built and what it takes")
    parser.add_argument("--inspect", action="store_true", help="print the engines that are there, and check them")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _several(text: str) -> int:
    if (count := _positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 2")
    return count


def _gib(text: str) -> int:
    """Bytes."""
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB above 0")
    return size


def _completed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """With what the plan says in place of what was not given."""
    plan = PLANS[args.plan] if args.plan else None
    of_plan = {}
    if plan is not None:
        library = next(name for name, library in _LIBRARIES.items() if library is plan.card.library)
        of_plan = {"target": plan.card.compute_capability, "precision": str(plan.precision), "library": library}
    for name in ("target", "precision", "library"):
        given, planned = getattr(args, name), of_plan.get(name)
        if given and planned and given != planned:
            parser.error(f"--{name} {given}: --plan {args.plan} has {planned}; leave one of them out")
        if not (given or planned or args.inspect):
            parser.error(f"--{name} is missing; or name a plan: --plan {', '.join(PLANS)}")
        setattr(args, name, given or planned)
    return args


def main() -> None:
    parser = _parser()
    args = _completed(parser, parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.inspect:
            found = inspect_engines(args)
            print(found)
            if found.problems:
                sys.exit(1)
        else:
            print(build_engines(args))
    except WicoreError as error:
        raise SystemExit(f"build_engines: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("build_engines: interrupted; the same command goes on with what is missing") from None


if __name__ == "__main__":
    main()
