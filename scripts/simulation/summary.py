"""What a replay showed, in figures and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scripts.simulation.replay import End, Record, Replayed


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """What became of the requests of one class. Times are in seconds, None where nobody came that far."""

    requests: int
    good: int
    finished: int
    rejected: int
    expired: int
    late: int
    """Finished, but with the first token after its deadline."""
    slow: int
    """Finished, but with too much time for each token."""
    queue_p50_s: float | None
    queue_p99_s: float | None
    queue_p99_steps: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    preempted: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One run."""

    load: float
    requests_per_s: float
    goodput_per_s: float
    """Good requests over the time from the first arrival to the last end."""
    good_share: float
    unended: int
    classes: dict[str, ClassSummary]
    longest_queue_s: float
    seconds: float
    steps: int
    tokens_per_s: float
    """Computed, prompts and answers."""
    computed_in_vain: float
    """Share of these that were for requests that expired."""
    preemptions: int
    lost_tokens: int
    promotions: int
    prefix_hit_share: float
    rejections: dict[str, int]
    model_error: float
    wall_s: float


def percentile(values: Iterable[float | None], share: float) -> float | None:
    """The smallest value that `share` of the values do not exceed; None is left out."""
    known = sorted(v for v in values if v is not None)
    return known[min(len(known) - 1, int(share * len(known)))] if known else None


def summarize_class(records: Sequence[Record], good_tpot_s: float) -> ClassSummary:
    finished = [r for r in records if r.end is End.FINISHED]
    tpots = [r.tpot_s for r in finished if r.tokens > 1]
    return ClassSummary(
        requests=len(records),
        good=sum(r.is_good(good_tpot_s) for r in records),
        finished=len(finished),
        rejected=sum(r.end is End.REJECTED for r in records),
        expired=sum(r.end is End.EXPIRED for r in records),
        late=sum(r.deadline_s is not None and r.ttft_s is not None and r.ttft_s > r.deadline_s for r in finished),
        slow=sum(r.tpot_s > good_tpot_s for r in finished),
        queue_p50_s=percentile((r.queue_s for r in records), 0.5),
        queue_p99_s=percentile((r.queue_s for r in records), 0.99),
        queue_p99_steps=percentile((r.queue_steps for r in records), 0.99),
        ttft_p50_s=percentile((r.ttft_s for r in finished), 0.5),
        ttft_p99_s=percentile((r.ttft_s for r in finished), 0.99),
        tpot_p50_s=percentile(tpots, 0.5),
        tpot_p99_s=percentile(tpots, 0.99),
        preempted=sum(r.preemptions > 0 for r in records),
    )


def summarize(replayed: Replayed, good_tpot_s: float, load: float, wall_s: float) -> Summary:
    records, counts = replayed.records, replayed.counts
    names = {k.name: None for k in sorted({r.arrival.klass for r in records}, key=lambda k: k.priority)}
    classes = {
        name: summarize_class([r for r in records if r.arrival.klass.name == name], good_tpot_s) for name in names
    }
    good = sum(c.good for c in classes.values())
    prompts = counts.prefix_hit_tokens + counts.prefix_missed_tokens
    return Summary(
        load=load,
        requests_per_s=len(records) / replayed.seconds,
        goodput_per_s=good / replayed.seconds,
        good_share=good / len(records),
        unended=sum(r.end is None for r in records),
        classes=classes,
        longest_queue_s=max((r.queue_s for r in records if r.queue_s is not None), default=0.0),
        seconds=replayed.seconds,
        steps=replayed.steps,
        tokens_per_s=replayed.computed_tokens / replayed.seconds,
        computed_in_vain=replayed.computed_in_vain / replayed.computed_tokens,
        preemptions=counts.preemptions,
        lost_tokens=counts.lost_tokens,
        promotions=counts.promotions,
        prefix_hit_share=counts.prefix_hit_tokens / max(1, prompts),
        rejections=replayed.rejections,
        model_error=replayed.model_error,
        wall_s=wall_s,
    )


COLUMNS = (
    "load",
    "class",
    "requests",
    "good",
    "late",
    "slow",
    "rejected",
    "expired",
    "queue p50/p99 s",
    "p99 steps",
    "TTFT p50/p99 s",
    "TPOT p50/p99 ms",
)


def rows(summary: Summary, name: str) -> Iterator[tuple[str, ...]]:
    """The table's rows of one run, the whole first."""
    yield (
        name,
        f"all: {summary.goodput_per_s:.3f} good/s",
        str(sum(c.requests for c in summary.classes.values())),
        f"{summary.good_share:.1%}",
        *(str(sum(getattr(c, n) for c in summary.classes.values())) for n in ("late", "slow", "rejected", "expired")),
        f"longest {summary.longest_queue_s:.1f}",
        "",
        f"{summary.preemptions} preempted",
        f"in vain {summary.computed_in_vain:.1%}",
    )
    for klass, c in summary.classes.items():
        yield (
            "",
            klass,
            str(c.requests),
            f"{c.good / c.requests:.1%}",
            *map(str, (c.late, c.slow, c.rejected, c.expired)),
            _pair(c.queue_p50_s, c.queue_p99_s),
            "" if c.queue_p99_steps is None else f"{c.queue_p99_steps:.0f}",
            _pair(c.ttft_p50_s, c.ttft_p99_s),
            _pair(c.tpot_p50_s, c.tpot_p99_s, scale=1000, digits=0),
        )


def _pair(low: float | None, high: float | None, *, scale: float = 1.0, digits: int = 2) -> str:
    return "" if low is None or high is None else f"{scale * low:.{digits}f} / {scale * high:.{digits}f}"


def print_table(table: Sequence[Sequence[str]]) -> None:
    """A Markdown table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    ruled = [table[0], ["-" * width for width in widths], *table[1:]]
    for row in ruled:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
