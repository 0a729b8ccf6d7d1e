"""What building engines takes, before it begins: time, memory, disk. Numbers are of docs/benchmarks/tensorrt.md."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wicore_backend.devices.memory import segment_bytes
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, segments
from wicore_backend.executor.segments.manifest import WeightsAs
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.sizes import disk_size, gib

_BASE_BYTES = 512 * 2**20
"""Of a process with PyTorch and the library, before it has read a weight."""
_COPIES: Mapping[Precision, float] = {
    Precision.FP32: 6.4,
    Precision.BF16: 3.2,
    Precision.FP16: 3.2,
    Precision.FP8: 3.6,
    Precision.INT4: 2.8,
}
"""Of a segment's weights in bfloat16, at once: as read, as its graph has them, and as the library does."""
_TOWER_COPIES = 4.2
_BYTES_PER_SECOND: Mapping[Precision, float] = {
    Precision.FP32: 50e6,
    Precision.BF16: 100e6,
    Precision.FP16: 70e6,
    Precision.FP8: 100e6,
    Precision.INT4: 55e6,
}
"""Of weights in bfloat16, on one core; in INT4, that have their codes already, or are rounded to the nearest."""
_SEARCHED_BYTES_PER_SECOND = 7.7e6
"""Where scales are searched for."""
_SEGMENT_SECONDS = 0.6
_INT4_SHARE = 4.125 / 16
_GRAPH_BYTES = 2**20
"""Of an engine or a graph that has no weights in it."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one engine computes: a segment, or several of the same shape whose weights it is given.

    Attributes
    ----------
    engine_bytes
        Of its file.
    memory_bytes
        Of the process that exports and builds it, at most.
    seconds
        On one core.
    """

    segments: tuple[Segment, ...]
    engine_bytes: int
    memory_bytes: int
    seconds: float

    @property
    def name(self) -> str:
        """`mid_007`, or `mid` for all of them."""
        return self.segments[0].name if len(self.segments) == 1 else str(self.segments[0].kind)


def parts(
    config: Gemma3Config, precision: Precision, weights: WeightsAs, *, searched: bool = False
) -> tuple[Part, ...]:
    """The engines of a model, in the order of its segments.

    Parameters
    ----------
    searched
        The decoder's matrices are plain, and will be rounded to INT4 with the best of many scales.
    """
    plain, stored = segment_bytes(config, Precision.BF16), segment_bytes(config, precision)
    groups: list[tuple[Segment, ...]] = []
    for segment in segments(config):
        if weights == "inputs" and segment.kind is SegmentKind.MID and groups[-1][0].kind is SegmentKind.MID:
            groups[-1] += (segment,)
        else:
            groups.append((segment,))
    # In INT4 the rest of a segment, the head above all, is as it was.
    rounded = {segment: (plain[segment] - stored[segment]) / (1 - _INT4_SHARE) if searched else 0 for segment in plain}
    return tuple(
        _part(group, plain[group[0]], stored[group[0]], rounded[group[0]], precision, weights) for group in groups
    )


def _part(
    group: tuple[Segment, ...], plain: int, stored: int, rounded: float, precision: Precision, weights: WeightsAs
) -> Part:
    if weights == "inputs":
        return Part(group, _GRAPH_BYTES, _BASE_BYTES + plain, _SEGMENT_SECONDS)
    copies = _TOWER_COPIES if group[0].kind is SegmentKind.VISION else _COPIES[precision]
    seconds = plain / _BYTES_PER_SECOND[precision] + rounded / _SEARCHED_BYTES_PER_SECOND
    return Part(group, stored + _GRAPH_BYTES, _BASE_BYTES + round(copies * plain), _SEGMENT_SECONDS + seconds)


def disk_needed(todo: Sequence[Part], *, jobs: int, keep_onnx: bool) -> int:
    """Bytes that building `todo` takes at most: engines, and the graphs that are there at once."""
    graphs = sorted((part.engine_bytes for part in todo), reverse=True)
    return sum(graphs) + sum(graphs if keep_onnx else graphs[:jobs])


def check_disk(directory: Path, needed: int) -> None:
    """Whether the disk of `directory`, which need not exist, has room.

    Raises
    ------
    ExecutorError
        If it has not.
    """
    free = free_bytes(directory)
    if needed > free:
        raise ExecutorError(
            f"{directory} will take up to {disk_size(needed)}, and its disk has {disk_size(free)} free; make room, "
            "or name another directory with --engines"
        )


def free_bytes(directory: Path) -> int:
    """Of the disk that `directory` is, or will be, on."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_memory(todo: Sequence[Part], budget: int) -> None:
    """Whether each of `todo` can be built in `budget` bytes of memory.

    Raises
    ------
    ExecutorError
        If one cannot.
    """
    for part in todo:
        if part.memory_bytes > budget:
            raise ExecutorError(
                f"{part.name} needs about {gib(part.memory_bytes)} GiB of memory to be built, and there are "
                f"{gib(budget)}; give it more (--memory), close what takes it, or build on a larger machine: "
                "engines of TensorRT-RTX can be copied"
            )


def available_memory() -> int:
    """Bytes that processes can have now, of the machine or of the container that this is."""
    meminfo = Path("/proc/meminfo").read_text()
    machine = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    limit, used, parts = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return machine
    # Files that were read a while ago count as used there, and give way.
    files = next(int(line.split()[1]) for line in parts.read_text().splitlines() if line.startswith("inactive_file"))
    return min(machine, int(most) - int(used.read_text()) + files)
