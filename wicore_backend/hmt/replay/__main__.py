"""Command line of the replay tool."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.policy import Key, Policy
from wicore_backend.hmt.replay.plot import check_plotting, plot_hit_rates
from wicore_backend.hmt.replay.simulator import named, replay
from wicore_backend.hmt.replay.tiers import POLICY_NAMES, CostModel, TierName, Tiers, TierSpec, make_policy
from wicore_backend.hmt.replay.trace import TraceRequest, read_trace

CAPACITIES = (1000, 2500, 5000, 10000, 20000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a trace and print what each policy made of it; the exit code is 2 if an argument or the trace is bad."""
    options = _parse(arguments)
    try:
        if options.plot:
            check_plotting()
        colder = [TierSpec.parse(text) for text in options.tiers]
        costs = CostModel(
            prefill_tokens_per_second=options.prefill_rate,
            block_tokens=options.block_tokens,
            block_bytes=options.block_bytes,
            **{f"{tier.name}_gigabytes_per_second": tier.gigabytes_per_second for tier in colder},
        )
        arrangements = [Tiers.of(capacity, colder) for capacity in sorted(set(options.capacity_blocks))]
        requests = read_trace(options.trace, block_tokens=options.block_tokens)
        chains = named(requests)
        policies = POLICY_NAMES if "all" in options.policy else tuple(dict.fromkeys(options.policy))
        rows = [_row(name, tiers, requests, chains, costs) for name in policies for tiers in arrangements]
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
    parser.add_argument(
        "--capacity-blocks",
        nargs="+",
        type=positive,
        default=list(CAPACITIES),
        metavar="BLOCKS",
        help="of the warmest tier: host memory, or the device if --tiers has host memory",
    )
    parser.add_argument("--block-tokens", type=positive, default=512, help="tokens of one block of the trace")
    parser.add_argument(
        "--tiers", nargs="*", default=[], metavar="NAME=BLOCKS@GBPS", help="colder tiers: host, nvme, or both"
    )
    parser.add_argument("--prefill-rate", type=positive, default=12_500, help="tokens/s, for the time saved")
    parser.add_argument("--block-bytes", type=positive, default=CostModel().block_bytes, help="for bytes moved")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw hit rate against capacity")
    return parser.parse_args(arguments)


def _row(
    name: str, tiers: Tiers, requests: Sequence[TraceRequest], names: Sequence[BlockNames], costs: CostModel
) -> dict[str, Any]:
    paths = [chain.first(len(request.blocks)) for request, chain in zip(requests, names, strict=True)]

    def policy(tier: TierName, capacity: int) -> Policy:
        prompts: Sequence[Sequence[Key]] = paths
        if tier is TierName.NVME:
            prompts = [[(LayerGroup.GLOBAL, block) for block in path] for path in paths]
        return make_policy(name, capacity, prompts)

    result = replay(requests, names, tiers, policy, costs)
    hit_tokens = sum(half.hit_tokens for half in result.halves)
    blocks = sum(half.blocks for half in result.halves)
    return {
        "policy": name,
        "capacity_blocks": next(iter(tiers.blocks.values())),
        "hit_rate": {
            "whole": result.hit_rate,
            "first_half": result.halves[0].hit_rate,
            "second_half": result.halves[1].hit_rate,
        },
        "hit_tokens": hit_tokens,
        "prefill_seconds_saved": costs.seconds_saved(hit_tokens, result.loaded),
        "restores_declined": result.restores_declined,
        "tiers": [
            {
                "tier": tier,
                "capacity_blocks": capacity,
                "hit_rate": sum(half.hit_blocks[tier] for half in result.halves) / blocks,
                "stored_bytes": result.stored[tier] * costs.block_bytes,
                "restored_bytes": result.loaded[tier] * costs.block_bytes,
            }
            for tier, capacity in tiers.blocks.items()
        ],
        "microseconds_per_block": 1e6 * result.seconds / blocks,
    }


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
