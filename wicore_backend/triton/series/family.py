"""A family of series, and the forms that most have: one value, or one for each of a few labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wicore_backend.engine.health import Health
from wicore_backend.engine.statistics import EngineStatistics

Samples = Iterable[tuple[Mapping[str, str], float]]
"""Values of a family's series, by their labels."""

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Family:
    """Series of one name."""

    kind: Kind
    name: str
    description: str
    read: Callable[[EngineStatistics, Health], Samples]
    """Those that there are by now: a series may come later, and none ever goes."""


def one(kind: Kind, name: str, description: str, read: Callable[[EngineStatistics], float | None]) -> Family:
    """A series without labels, which is there once `read` has a value."""

    def samples(statistics: EngineStatistics, _: Health) -> Samples:
        value = read(statistics)
        return [] if value is None else [({}, value)]

    return Family(kind, name, description, samples)


def labelled(
    kind: Kind, name: str, description: str, label: str, read: Callable[[EngineStatistics], Mapping[Any, float]]
) -> Family:
    """A series for each of the label's values."""
    return Family(kind, name, description, lambda statistics, _: by(label, read(statistics)))


def by(label: str, values: Mapping[Any, float]) -> Samples:
    """The values, each with its key as the label's."""
    return [({label: str(key)}, value) for key, value in values.items()]
