"""Many short requests over all tiers, a third of them cancelled at any moment: in the end nothing may be left in use.

    python -m scripts.leak_test --requests 10000

The demo model on a device that holds two or three prompts, host memory for three or four, and a disk for all of them:
nearly every request has blocks spilled, and many have them restored. Some give a deadline that they miss, some ask for
several answers. Prints what happened as a table. Ends with an error if a block, a slot, a pin or a request is left, or
if an answer that was heard to its end is not the one that the model gives without a cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from scripts.serving.installation import ROOT
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.request import Deadlines, FinishReason, TokensEvent
from wicore_backend.engine.results import EventStream
from wicore_backend.processor.prompt import Prompt

_TOPICS = 12
_CLIENTS = 6
_DEMO: dict[str, Any] = {"model": ROOT / "models" / "wicore-demo", "device": "cpu", "dtype": "float32", "threads": 1}
_SMALL: dict[str, Any] = {
    "kv_cache_bytes": 9_000_000,
    "host_cache_bytes": 12_000_000,
    "nvme_cache_bytes": 60_000_000,
    "nvme_codec": "exact",
    "max_model_len": 1024,
    "max_running": 4,
}


def leak_test(requests: int, directory: Path, *, seed: int) -> Counter[str]:
    """What happened. Raises AssertionError if something is left, or wrong."""
    random = Random(seed)
    prompts = [[2, *random.choices(range(300, 1500), k=random.randrange(200, 800))] for _ in range(_TOPICS)]
    with Engine(EngineConfig(**_DEMO, prefix_cache=False)) as engine:
        expected = [engine.stream(prompt, _greedy(8)).collect().token_ids for prompt in prompts]
    tally: Counter[str] = Counter()
    with (
        Engine(EngineConfig(**_DEMO, **_SMALL, nvme_cache_path=directory)) as engine,
        ThreadPoolExecutor(_CLIENTS) as clients,
    ):

        def ask(number: int) -> str:
            return _ask(engine, Random(f"{seed} {number}"), prompts, expected)

        for ending in clients.map(ask, range(requests)):
            tally[ending] += 1
        _assert_nothing_left(engine)
        counts, lower = engine._scheduler.counts, engine._model.blocks.lower
        assert lower is not None
        for group in lower.host.slots:
            tally["blocks spilled to host memory"] += lower.host.counts(group).spilled
            tally["blocks loaded from host memory"] += lower.host.counts(group).loaded
        tally["waits for the disk"] = counts.restores
        tally["prompt tokens found in the cache"] = counts.prefix_hit_tokens
        tally["prompt tokens computed"] = counts.prefix_missed_tokens
        tally["preemptions"] = counts.preemptions
    return tally


def _ask(engine: Engine, random: Random, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> str:
    which = random.randrange(len(prompts))
    events = EventStream(lambda: None)
    request = engine.submit(
        Prompt(np.array(prompts[which], np.int32)),
        _greedy(8, answers=random.choice([1, 1, 1, 2])),
        sink=events.put,
        tenant=random.choice(["", "", "b"]),
        deadlines=Deadlines(total_s=random.choice([None, None, None, 0.02])),
    )
    if random.random() < 1 / 3:
        time.sleep(random.random() * 0.05)
        engine.cancel(request)
    heard: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, TokensEvent):
            heard.setdefault(event.index, []).extend(event.token_ids)
        else:
            reason = event.reason
    for tokens in heard.values():
        assert tokens == expected[which][: len(tokens)], "an answer differs from that of the model without a cache"
    if reason is FinishReason.LENGTH:
        assert all(len(tokens) == len(expected[which]) for tokens in heard.values()), "an answer is not whole"
    return f"requests that ended: {reason}"


def _greedy(tokens: int, *, answers: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, n=answers)


def _assert_nothing_left(engine: Engine) -> None:
    end = time.monotonic() + 10
    while (now := engine.statistics()).running or now.waiting:
        assert time.monotonic() < end, "a request does not end"
        time.sleep(0.01)
    assert not any(usage.active for usage in now.blocks.values()), "a device block is in use"
    lower = engine._model.blocks.lower
    assert lower is not None
    assert not lower.host.pins(), "a block of the host tier is pinned"
    engine._scheduler.check_integrity()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="for the disk's part; by default a new one that is removed")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        tally = leak_test(args.requests, Path(directory), seed=args.seed)
    print(
        f"{date.today()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"{(time.monotonic() - began) / 60:.1f} minutes; nothing was left.\n"
    )
    print("| what happened | how often |\n|---|---|")
    for what, count in sorted(tally.items()):
        print(f"| {what} | {count:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
