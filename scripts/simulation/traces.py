"""Request traces of production chat services: when each request came, how long it was, what it shared with others."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace.

    Attributes
    ----------
    arrival_s
        Seconds after the trace's first request.
    prompt_tokens, answer_tokens
        Lengths. The scheduler is never told the second.
    blocks
        An id for each block of the prompt, the last of which may be partly filled: equal ids are equal prefixes.
        None if the trace does not say.
    """

    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival. `block_size` is that of their ids, in tokens; None without ids."""

    name: str
    requests: tuple[TraceRequest, ...]
    block_size: int | None = None

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].arrival_s

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.seconds

    def first(self, seconds: float) -> Trace:
        """The beginning of this trace."""
        return replace(self, requests=tuple(r for r in self.requests if r.arrival_s <= seconds))


def read_trace(path: Path) -> Trace:
    """A trace in the form of AzurePublicDataset (.csv) or of Mooncake (.jsonl).

    Raises
    ------
    ValueError
        If the file has another ending, or a line that is not of its form.
    """
    with path.open(newline="", encoding="utf-8") as file:
        match path.suffix:
            case ".csv":
                return Trace("azure", _from_zero(_azure(csv.DictReader(file))))
            case ".jsonl":
                return Trace("mooncake", _from_zero(_mooncake(file)), block_size=512)
    raise ValueError(f"{path} is neither .csv (AzurePublicDataset) nor .jsonl (Mooncake)")


def find_traces() -> list[Path]:
    """The traces that lie in a folder `traces` in the repository or up to two steps beside it."""
    patterns = ("AzureLLMInferenceTrace_*.csv", "mooncake_*_trace.jsonl")
    folders = [REPOSITORY / "traces", REPOSITORY.parent / "traces", *sorted(REPOSITORY.parent.glob("*/traces"))]
    return next((found for f in folders if (found := [p for pattern in patterns for p in f.glob(pattern)])), [])


def _azure(rows: Iterable[dict[str, str]]) -> Iterator[TraceRequest]:
    for row in rows:
        # Seven digits of a second are one more than Python's datetime takes.
        arrival = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        yield TraceRequest(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for line in lines:
        row = json.loads(line)
        yield TraceRequest(
            row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(map(int, row["hash_ids"]))
        )


def _from_zero(requests: Iterator[TraceRequest]) -> tuple[TraceRequest, ...]:
    ordered = sorted(requests, key=lambda r: r.arrival_s)
    if len(ordered) < 2:
        raise ValueError("a trace needs two requests or more, to have a rate")
    begin = ordered[0].arrival_s
    return tuple(replace(r, arrival_s=r.arrival_s - begin) for r in ordered)
