"""The graphs that ONNX Runtime is given: exported from the checkpoint once, found again afterwards."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from wicore_backend.config import EngineConfig
from wicore_backend.engine.executors import engines_directory
from wicore_backend.errors import ExecutorError, SegmentError
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.exclusive import exporting_alone
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.segments.manifest import MANIFEST, SegmentSet, WeightsAs
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.observability.progress import ByteProgress

_log = logging.getLogger(__name__)


def exported_segments(settings: EngineConfig, precision: Precision, *, weights: WeightsAs) -> SegmentSet:
    """The segments of the settings' model in `precision`: those in its `engines`, or, where there are none, new ones.

    Several processes may ask at once: one exports, and the others wait for it. What an export that was cut short left
    behind is gone on with.

    Parameters
    ----------
    weights
        How to export them; those that are there may be otherwise.

    Raises
    ------
    CheckpointError
        If the checkpoint is broken.
    SegmentError
        If what is there is damaged or of another checkpoint, or if the model cannot be in this precision.
    ExecutorError
        If there is nothing, and no place to write it.
    """
    fingerprint = checkpoint_fingerprint(settings.model).hex()
    directory = engines_directory(settings, fingerprint=fingerprint) / precision
    if not (directory / MANIFEST).exists():
        try:
            with exporting_alone(directory):
                if not (directory / MANIFEST).exists():
                    _export(settings.model, directory, precision, weights)
        except OSError as error:
            raise ExecutorError(
                f"the model's graphs cannot be exported to {directory}: {error.strerror or error}; set engines to a "
                "directory that can be written, or to one that holds them"
            ) from None
    exported = SegmentSet.read(directory)
    if (exported.fingerprint, exported.precision) != (fingerprint, precision):
        raise SegmentError(
            f"{directory} holds segments in {exported.precision} of checkpoint {exported.fingerprint[:12]}, and "
            f"{settings.model} in {precision} is {fingerprint[:12]}; remove that directory, or set engines to another"
        )
    return exported


def _export(model: Path, directory: Path, precision: Precision, weights: WeightsAs) -> None:
    began = time.monotonic()
    _log.info("%s: exporting graphs in %s to %s, which is done once", model.name, precision, directory)
    with ByteProgress(f"{model.name}: exporting", _log) as progress:
        export_segments(model, directory, precision, weights=weights, progress=progress)
    _log.info("%s: exported in %.1f s", model.name, time.monotonic() - began)
