"""What the matrices of a decoder layer and the head are for."""

from __future__ import annotations

from typing import Literal

Role = Literal["qkv", "out", "gate_up", "down", "head"]
