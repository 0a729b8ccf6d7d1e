"""The cold tier under any order of calls, on a disk that fails at random: right bytes or misses, balanced books."""

import errno
import threading
import time
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cold_tier_bench import GLOBAL, LOCAL, SHAPES, SLOTS, Bench, name
from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.cold_tier import (
    Restore,
)
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_order_of_calls_gives_right_bytes_or_misses_and_balanced_books(tmp_path_factory, seed):
    """The loop thread at random, against a disk that fails at random; another thread asks and flushes meanwhile."""
    rng = np.random.default_rng(seed)

    class Moody(FaultyFiles):
        def meet(self, what):
            draw = moods.random()
            if what in ("read", "write") and draw < 0.02:
                time.sleep(0.03)
            elif what in ("read", "write") and draw < 0.04:
                raise OSError(errno.EBUSY, "moody")
            super().meet(what)

    moods = np.random.default_rng(seed + 1)
    over = threading.Event()
    errors: list[BaseException] = []
    directory = tmp_path_factory.mktemp("store")
    with Bench(
        directory, capacity_bytes=150_000, open_files=Moody, read_deadline_s=0.02, write_deadline_s=0.02, retry_s=0.001
    ) as bench:
        tier = bench.tier

        def look():
            try:
                while not over.is_set():
                    tier.holds(GLOBAL, name(3))
                    tier.statistics()
                    tier.restore_seconds(1000)
            except BaseException as error:
                errors.append(error)

        looker = threading.Thread(target=look)
        looker.start()
        free = {group: set(range(SLOTS)) for group in SHAPES}
        restores: list[Restore] = []
        outcomes: Counter[Outcome] = Counter()

        def take_reports():
            for block, outcome, restore in tier.finished():
                outcomes[outcome] += 1
                free[block.group].add(block.slot)
                if restore is not None and outcome is Outcome.DONE:
                    assert bench.right(block)
                bench.slots[block.group][block.slot].fill_(9)  # The caller's again.

        for _ in range(60):
            group = (GLOBAL, LOCAL)[int(rng.integers(2))]
            count = min(len(free[group]), int(rng.integers(1, 9)))
            slots = rng.permutation(sorted(free[group]))[:count].tolist()
            numbers = rng.choice(40, count, replace=False).tolist()
            match int(rng.integers(5)):
                case 0 | 1:
                    blocks = [bench.put(group, n, slot) for n, slot in zip(numbers, slots, strict=True)]
                    taken = tier.spill(blocks, (lambda: time.sleep(0.001)) if rng.random() < 0.3 else None)
                    free[group] -= {block.slot for block in blocks[:taken]}
                case 2:
                    up = [SlotBlock(group, name(n), slot) for n, slot in zip(numbers, slots, strict=True)]
                    restores.append(
                        tier.restore(up, float(rng.choice([0.001, 0.02, 5])) if rng.random() < 0.5 else None)
                    )
                    free[group] -= set(slots)
                case 3 if restores:
                    restores[int(rng.integers(len(restores)))].cancel()
                case _:
                    time.sleep(0.002)
            take_reports()
            tier.check_integrity()
        end = time.monotonic() + 10
        while tier.busy:
            assert time.monotonic() < end, outcomes
            take_reports()
        over.set()
        looker.join(10)
        assert not errors
        assert all(restore.done for restore in restores)
        assert free == {group: set(range(SLOTS)) for group in SHAPES}
        assert outcomes[Outcome.DONE] > 0
        tier.check_integrity()


def test_a_slot_that_was_reported_is_read_and_written_no_more(tmp_path):
    """Whoever gets a slot back fills it at once with something else; that is never stored, nor overwritten."""
    with Bench(tmp_path, "q8") as bench:
        for turn in range(10):
            blocks = [bench.put(GLOBAL, 100 * turn + slot, slot) for slot in range(SLOTS)]
            bench.tier.spill(blocks)
            seen = 0
            while seen < SLOTS:
                bench.news.wait(5)
                bench.news.clear()
                for done in bench.tier.finished():
                    bench.slots[GLOBAL][done.block.slot].fill_(float("nan"))
                    seen += 1
        for turn in range(10):
            up = [SlotBlock(GLOBAL, name(100 * turn + slot), slot) for slot in range(SLOTS)]
            assert set(bench.restore(up)) == {Outcome.DONE}
            assert all(bench.right(block) for block in up)
