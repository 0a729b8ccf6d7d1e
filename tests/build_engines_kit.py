"""The command that builds engines, and what tests build them of."""

import sys
from pathlib import Path

from scripts import build_engines

NAMES = ("first", "mid_000", "mid_001", "last", "vision")
CONFIG = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 131_072}


def arguments(engines: Path, *more: str) -> list[str]:
    return ["--engines", str(engines), "--target", "sm89", "--precision", "bf16", "--library", "rtx", *more]


def call(model: Path, monkeypatch, *args: str) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["build_engines", str(model), *args])
    build_engines.main()
