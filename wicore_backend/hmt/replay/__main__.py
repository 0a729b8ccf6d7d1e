"""Command line of the replay tool."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.replay.plot import plot_hit_rates
from wicore_backend.hmt.replay.simulator import ReplayResult, Tier, replay
from wicore_backend.hmt.replay.tiers import POLICY_NAMES, CostModel, TierSpec, make_policy
from wicore_backend.hmt.replay.trace import TraceRequest, read_trace

CAPACITIES = (1000, 2500, 5000, 10000, 20000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a trace and print what each policy made of it; the exit code is 2 if an argument or the trace is bad."""
    options = _parse(arguments)
    try:
        tiers = [TierSpec.parse(text) for text in options.tiers]
        costs = CostModel(prefill_tokens_per_second=options.prefill_rate, block_bytes=options.block_bytes)
        requests = read_trace(options.trace, block_tokens=options.block_tokens)
        names = POLICY_NAMES if "all" in options.policy else tuple(dict.fromkeys(options.policy))
        rows = [
            _row(name, capacity, requests, tiers, costs, options.block_tokens)
            for name in names
            for capacity in sorted(set(options.capacity_blocks))
        ]
        if options.plot:
            curves: dict[str, dict[int, float]] = {}
            for row in rows:
                curves.setdefault(row["policy"], {})[row["capacity_blocks"]] = row["hit_rate"]["second_half"]
            plot_hit_rates(curves, options.plot, title=f"{options.trace.name}, second half")
    except InvalidArgumentError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"trace": str(options.trace), "requests": len(requests), "runs": rows}, indent=2))
    else:
        _print_table(rows)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError(text)
        return value

    parser = argparse.ArgumentParser(prog="python -m wicore_backend.hmt.replay", description=__doc__)
    parser.add_argument("trace", type=Path, help="JSON lines with timestamp (ms), input_length, hash_ids")
    parser.add_argument("--policy", nargs="+", default=["all"], choices=(*POLICY_NAMES, "all"), metavar="NAME")
    parser.add_argument("--capacity-blocks", nargs="+", type=positive, default=list(CAPACITIES), metavar="BLOCKS")
    parser.add_argument("--block-tokens", type=positive, default=512, help="tokens of one block of the trace")
    parser.add_argument(
        "--tiers", nargs="*", default=[], metavar="NAME=BLOCKS@GBPS", help="colder tiers, warmest first"
    )
    parser.add_argument("--prefill-rate", type=positive, default=12_500, help="tokens/s, for the time saved")
    parser.add_argument("--block-bytes", type=positive, default=CostModel().block_bytes, help="for bytes moved")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw hit rate against capacity")
    return parser.parse_args(arguments)


def _row(
    name: str,
    capacity: int,
    requests: Sequence[TraceRequest],
    colder: Sequence[TierSpec],
    costs: CostModel,
    block_tokens: int,
) -> dict[str, Any]:
    tiers = [Tier("device", make_policy(name, capacity, requests))]
    tiers += [Tier(tier.name, make_policy(name, tier.blocks, requests)) for tier in colder]
    result = replay(requests, tiers, block_tokens=block_tokens)
    hit_tokens = sum(half.hit_tokens for half in result.halves)
    return {
        "policy": name,
        "capacity_blocks": capacity,
        "hit_rate": {
            "whole": result.hit_rate,
            "first_half": result.halves[0].hit_rate,
            "second_half": result.halves[1].hit_rate,
        },
        "hit_tokens": hit_tokens,
        "prefill_seconds_saved": costs.seconds_saved(hit_tokens, result.restored[1:], colder),
        "tiers": _tier_rows(tiers, result, costs),
        "microseconds_per_block": 1e6 * result.seconds / sum(half.blocks for half in result.halves),
    }


def _tier_rows(tiers: Sequence[Tier], result: ReplayResult, costs: CostModel) -> list[dict[str, Any]]:
    blocks = sum(half.blocks for half in result.halves)
    return [
        {
            "tier": tier.name,
            "capacity_blocks": tier.policy.capacity,
            "hit_rate": sum(half.hit_blocks[level] for half in result.halves) / blocks,
            "stored_bytes": result.stored[level] * costs.block_bytes,
            "restored_bytes": result.restored[level] * costs.block_bytes if level else 0,
        }
        for level, tier in enumerate(tiers)
    ]


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'policy':<12}{'blocks':>9}{'hit % whole':>13}{'1st half':>10}{'2nd half':>10}{'saved s':>10}{'us/block':>10}"
    )
    for row in rows:
        rates = row["hit_rate"]
        print(
            f"{row['policy']:<12}{row['capacity_blocks']:>9,}{100 * rates['whole']:>13.2f}"
            f"{100 * rates['first_half']:>10.2f}{100 * rates['second_half']:>10.2f}"
            f"{row['prefill_seconds_saved']:>10.1f}{row['microseconds_per_block']:>10.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
