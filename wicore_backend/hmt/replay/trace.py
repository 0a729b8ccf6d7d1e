"""Block traces: who asked for which blocks, when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.settings import parse_json


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt of a trace.

    Attributes
    ----------
    time
        Arrival in seconds.
    tokens
        Length of the prompt.
    blocks
        Names of its blocks, root first, chained: a name stands for its block and everything before it.
    full_blocks
        How many of `blocks` are full.
    """

    time: float
    tokens: int
    blocks: tuple[int, ...]
    full_blocks: int


def read_trace(path: Path, *, block_tokens: int = 512) -> list[TraceRequest]:
    """The requests of a trace in Mooncake's format (FAST'25), in order of time.

    One JSON object a line: `timestamp` (ms), `input_length` (tokens), `hash_ids` (one chained id for each block of
    `block_tokens` tokens of the prompt). Other fields are ignored; `output_length` must be: nobody knows it at arrival.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read, is empty, or a line is none of that; it names the line.
    """
    try:
        with path.open("rb") as lines:
            requests = list(_parse(lines, path, block_tokens))
    except OSError as error:
        raise InvalidArgumentError(f"the trace {path} cannot be read: {error.strerror}") from None
    if not requests:
        raise InvalidArgumentError(f"the trace {path} has no requests")
    requests.sort(key=lambda request: request.time)
    return requests


def _parse(lines: Iterator[bytes] | Any, path: Path, block_tokens: int) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = parse_json(line, where)
        if not isinstance(fields, dict):
            raise InvalidArgumentError(f"{where}: a request is an object, not {type(fields).__name__}")
        timestamp, tokens, blocks = (fields.get(name) for name in ("timestamp", "input_length", "hash_ids"))
        if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not math.isfinite(timestamp):
            raise InvalidArgumentError(f"{where}: timestamp = {timestamp!r:.80} is not a number of milliseconds")
        if type(tokens) is not int or tokens < 0:
            raise InvalidArgumentError(f"{where}: input_length = {tokens!r:.80} is not a number of tokens")
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise InvalidArgumentError(f"{where}: hash_ids is not a list of integers")
        if len(set(blocks)) != len(blocks):
            raise InvalidArgumentError(f"{where}: hash_ids repeats an id; chained ids name a prefix each")
        full_blocks = min(len(blocks), tokens // block_tokens)
        yield TraceRequest(timestamp / 1000, tokens, tuple(blocks), full_blocks)
