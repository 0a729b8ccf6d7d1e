"""Hit rate against capacity, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from wicore_backend.errors import InvalidArgumentError


def check_plotting() -> None:
    """Raise InvalidArgumentError if matplotlib is not installed: better before a long replay than after it."""
    if find_spec("matplotlib") is None:
        raise InvalidArgumentError("--plot needs matplotlib; pip install 'wicore[plot]'")


def plot_hit_rates(curves: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> None:
    """Draw each policy's hit rates (0 to 1) over capacities in blocks to `path`, in the format its suffix names.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be written.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        capacities = sorted(curve)
        rates = [100 * curve[capacity] for capacity in capacities]
        axes.plot(capacities, rates, marker="o", markersize=3, label=name, linewidth=2.5 if name == "a2cr" else 1.2)
    axes.set_xscale("log")
    axes.set_xlabel("capacity in blocks")
    axes.set_ylabel("hit rate in %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"the plot cannot be written to {path}: {error}") from None
