"""Engines for the stand-in for TensorRT, as the builder leaves them, and the card that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.stand_in_tensorrt import SIDE_STREAM, STREAM, Plan
from wicore_backend.executor.segments.contract import Segment
from wicore_backend.executor.segments.manifest import SegmentSet
from wicore_backend.executor.tensorrt.library import Library
from wicore_backend.executor.tensorrt.profiles import Profile, profiles_for, profiles_of
from wicore_backend.executor.tensorrt.records import EngineKey, EngineRecord, EngineReport
from wicore_backend.executor.tensorrt.store import EngineFolder, EngineSet

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StandInCard:
    """A `Card` that is a CPU."""

    device: torch.device = CPU
    name: str = "Stand-in RTX"
    compute_capability: str = "sm89"
    free: int = 1 << 30

    @classmethod
    def of(cls, device: torch.device) -> StandInCard:
        """As `CudaCard.of`."""
        return cls(device)

    def leave_default_stream(self) -> None:
        """A CPU has none."""

    def free_bytes(self) -> int:
        return self.free

    def stream(self) -> int:
        return STREAM

    def side_stream(self) -> int:
        return SIDE_STREAM

    def settle(self) -> None:
        pass


def write_engines(
    exported: SegmentSet,
    root: Path,
    *,
    library: Library,
    profiles: tuple[Profile, ...] | None = None,
    compute_capability: str = "sm89",
    streams_weights: bool = False,
    weight_bytes: int = 1 << 20,
    activation_bytes: int = 1 << 12,
    faults: Mapping[Segment, str] | None = None,
) -> EngineSet:
    """Engines for the stand-in of all segments that were exported, as the builder leaves them."""
    profiles = profiles or profiles_for(max_running=8, max_batch_tokens=64)
    key = EngineKey(
        model=exported.fingerprint,
        precision=exported.precision,
        weights=exported.weights,
        library=library.name,
        version=library.version,
        compute_capability=compute_capability,
        profiles=profiles,
        weight_streaming=streams_weights,
        searched=exported.searched,
    )
    folder = EngineFolder.open(root, key)
    by_path: dict[Path, list[Segment]] = {}
    for segment, file in exported.files.items():
        by_path.setdefault(file.path, []).append(segment)
    for path, together in by_path.items():
        spec = exported.files[together[0]].spec
        ours = profiles_of(spec, profiles)
        dynamic = [tensor for tensor in spec.inputs if any(isinstance(size, str) for size in tensor.shape)]
        plan = Plan(
            onnx=str(path),
            compute_capability=compute_capability,
            ranges={tensor.name: [profile.shapes(tensor) for profile in ours] for tensor in dynamic},
            weight_bytes=weight_bytes,
            activation_bytes=tuple(activation_bytes + 256 * place for place in range(len(ours))),
            streams_weights=streams_weights,
            fault=(faults or {}).get(together[0]),
        )
        add(folder, together, plan)
    by_name = {name: record for record in folder.records for name in record.segments}
    return EngineSet(folder.directory, key, {segment: by_name[segment.name] for segment in exported.files})


def add(folder: EngineFolder, together: list[Segment], plan: Plan) -> None:
    """Put an engine in its folder."""
    from xxhash import xxh3_128_hexdigest

    content = plan.serialized()
    path = folder.path(together[0])
    path.write_bytes(content)
    report = EngineReport(
        inputs=(),
        outputs=(),
        layers={},
        precisions={},
        weight_bytes=plan.weight_bytes,
        activation_bytes=plan.activation_bytes,
    )
    folder.add(
        EngineRecord(
            segments=tuple(segment.name for segment in together),
            file=path.name,
            nbytes=len(content),
            digest=xxh3_128_hexdigest(content),
            seconds=0.0,
            report=report,
        )
    )
