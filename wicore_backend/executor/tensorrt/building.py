"""From a segment's ONNX file to an engine in a file, on a machine that may have no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.tensorrt.library import Library, LibraryName
from wicore_backend.executor.tensorrt.profiles import Profile
from wicore_backend.executor.tensorrt.records import EngineRecord

if TYPE_CHECKING:
    from wicore_backend.executor.segments.manifest import SegmentFile


@dataclass(frozen=True, slots=True)
class Target:
    """What engines are built for.

    Attributes
    ----------
    compute_capability
        "sm89"
    """

    library: LibraryName
    compute_capability: str
    precision: Precision


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build.

    Attributes
    ----------
    workspace_bytes
        Device memory that a kernel may take beside its inputs and results; None leaves it to the library.
    weight_streaming
        Let weights stay in host memory when the engine is run, as far as a budget says then.
    optimization_level
        0 to 5, of libraries that time kernels: more takes longer. None is the library's own.
    threads
        Of one build.
    """

    workspace_bytes: int | None = None
    weight_streaming: bool = False
    optimization_level: int | None = None
    threads: int = 1


BuildProgress = Callable[[str, int, int], bool]
"""Told a phase's name, the steps of it that are done, and how many there are; False ends the build."""


def build_engine(
    file: SegmentFile,
    path: Path,
    *,
    target: Target,
    profiles: Sequence[Profile],
    library: Library,
    timing_cache: Path | None = None,
    options: BuildOptions = BuildOptions(),
    progress: BuildProgress | None = None,
) -> EngineRecord:
    """Build the engine of a segment into `path`, which is there only when it is whole.

    Parameters
    ----------
    timing_cache
        A file that keeps what kernels took, for the next build; read and written where the library measures.

    Returns
    -------
    EngineRecord
        For `EngineFolder.add`. Its engine is held against the contract.

    Raises
    ------
    ExecutorError
        If the library cannot parse or build it: names the segment, the node, and what the library said.
    """
    raise NotImplementedError
