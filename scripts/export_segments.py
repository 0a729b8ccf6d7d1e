"""Exports the dense segments of a Gemma-3 checkpoint as ONNX graphs, for ONNX Runtime and to build engines of.

    python -m scripts.export_segments models/gemma-3-27b build/gemma-3-27b --precision bf16
    python -m scripts.export_segments models/gemma-3-27b-int4 build/gemma-3-27b --precision int4
    python -m scripts.export_segments models/gemma-3-4b build/gemma-3-4b --precision fp16 --weights inputs

They are written to OUT/PRECISION: `first`, one `mid` for each pair of neighbouring layers, `last` and, if the model
sees, `vision`, each a graph with its weights beside it, and `segments.json`, which names them. One segment's weights
are in memory at a time. A run that is cut short goes on where it was, and one that finds all in place does nothing.

A checkpoint in INT4 without zero points, in groups of 32, 64 or 128, keeps its own codes in `--precision int4`; others
are rounded again. Rounding a large model takes hours on a CPU: quantise it on a GPU first (scripts/quantize.py), or
leave the search for the best scales out with `--fast`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import get_args

from wicore_backend.errors import WicoreError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.exclusive import exporting_alone
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.manifest import WeightsAs
from wicore_backend.observability.progress import ByteProgress
from wicore_backend.sizes import disk_size

_log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint in Hugging Face's layout")
    parser.add_argument("out", type=Path, help="directory; each precision has one of its own in it")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), required=True)
    parser.add_argument(
        "--weights", choices=get_args(WeightsAs), default="embedded", help="within the graphs, or inputs"
    )
    parser.add_argument("--fast", action="store_true", help="round to INT4 without a search for the best scales")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    directory: Path = args.out / args.precision
    try:
        with exporting_alone(directory), ByteProgress(f"exporting in {args.precision}", _log) as progress:
            exported = export_segments(
                *(args.model, directory, args.precision),
                weights=args.weights,
                search=not args.fast,
                progress=progress,
            )
    except WicoreError as error:
        raise SystemExit(f"export_segments: {error}") from None
    except OSError as error:
        raise SystemExit(f"export_segments: {directory} cannot be written: {error.strerror}; name another") from None
    files = {file.path: file.nbytes for file in exported.files.values()}
    print(f"{directory}: {len(exported.files)} segments, {disk_size(sum(files.values()))}, {args.precision}")


if __name__ == "__main__":
    main()
