"""How long restores take, by the cold tier's own measure: found from what was moved, and kept up to date."""

import errno
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cold_tier_bench import GLOBAL, LIMITS, SLOTS, Bench, slot_blocks, wait_for_measurement
from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.cold_tier import ColdTierLimits
from wicore_backend.hmt.cold_tier.pace import Pace
from wicore_backend.hmt.nvme import Outcome


def test_a_pipelines_latency_and_bandwidth_are_found_from_its_batches():
    pace = Pace()
    now = 0.0
    rng = np.random.default_rng(0)
    for _ in range(40):
        started = now = now + 1.0
        for index in range(int(rng.integers(1, 5))):
            size = int(rng.integers(1 << 16, 1 << 22))
            now += 0.002 * (index == 0) + size / 2e9
            pace.add(started=started, size=size, first=index == 0, now=now)
    assert pace.cost is not None
    assert pace.cost.latency_s == pytest.approx(0.002, rel=1e-3)
    assert pace.bytes_per_second == pytest.approx(2e9, rel=1e-3)


@given(st.lists(st.tuples(st.floats(1e-6, 10.0), st.integers(1, 1 << 30), st.booleans()), min_size=1, max_size=30))
def test_a_pace_is_never_negative_whatever_was_measured(samples):
    pace = Pace()
    now = 0.0
    for seconds, size, first in samples:
        started, now = now, now + seconds
        pace.add(started=started, size=size, first=first, now=now)
        assert pace.cost is not None
        assert pace.cost.latency_s >= 0
        assert pace.cost.seconds_per_byte >= 0
        assert pace.cost.latency_s + pace.cost.seconds_per_byte > 0


def test_the_tier_measures_itself_before_anything_is_restored_and_after_a_restart(tmp_path):
    with Bench(tmp_path) as bench:
        assert bench.tier.restore_seconds(1 << 20) is None
        bench.spill_numbers(GLOBAL, range(20))
        wait_for_measurement(bench)
        statistics = bench.tier.statistics()
        assert statistics.spill_bytes_per_second is not None
        assert statistics.spilled_bytes == 20 * 2048
        assert statistics.restored_bytes == 0
        assert statistics.groups[GLOBAL].restores == {}
    with Bench(tmp_path) as bench:
        wait_for_measurement(bench)
        one, many = bench.tier.restore_seconds(1 << 20), bench.tier.restore_seconds(1 << 30)
        assert one is not None
        assert many is not None
        assert 0 < one <= many


def test_a_measurement_keeps_all_threads_of_the_store_reading(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))

    def silent(*args, **kwargs):
        files = FaultyFiles(*args, **kwargs)
        files.blocked.add("read")
        return files

    with Bench(tmp_path, open_files=silent) as bench:
        (files,) = bench.files
        assert isinstance(files, FaultyFiles)
        for _ in range(bench.store.config.read_threads):
            assert files.entered.acquire(timeout=5.0)


@pytest.mark.parametrize("codec", ["exact", "q8"])
def test_the_tiers_own_measurements_touch_no_slot(tmp_path, codec):
    with Bench(tmp_path, codec) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
    with Bench(tmp_path, codec, limits=replace(LIMITS, measure_s=0.01)) as bench:
        for slots in bench.slots.values():
            slots.fill_(3)
        wait_for_measurement(bench)
        end = time.monotonic() + 5
        while bench.store.statistics().fetches[Outcome.DONE] < 3 * SLOTS:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert all((slots == 3).all() for slots in bench.slots.values())


def test_what_is_under_way_comes_first_in_what_a_restore_would_take(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
        wait_for_measurement(bench)
        one, both = (bench.tier.restore_seconds(size) for size in (1 << 20, (1 << 20) + SLOTS * 2048))
        (files,) = bench.files
        files.blocked.add("read")
        restore = bench.tier.restore(slot_blocks(GLOBAL, range(SLOTS)))
        assert one is not None
        assert both is not None
        assert bench.tier.restore_seconds(1 << 20) == both > one
        restore.cancel()
        bench.wait(SLOTS)
        assert bench.tier.restore_seconds(1 << 20) == one


class LaterWritesWait(FaultyFiles):
    """The first write waits for `first`, all others for `go`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.first: threading.Event | None = threading.Event()
        self.begun = threading.Event()

    def write(self, run, pieces):
        mine, self.first = self.first or self.go, None
        self.begun.set()
        assert mine.wait(30)
        super().write(run, pieces)


def test_a_disk_is_not_measured_while_it_is_written_to(tmp_path):
    with Bench(tmp_path, open_files=LaterWritesWait) as bench:
        blocks = [bench.put(GLOBAL, number, number) for number in range(SLOTS)]
        (files,) = bench.files
        first = files.first
        assert bench.tier.spill(blocks[:1]) == 1
        assert files.begun.wait(5)
        assert bench.tier.spill(blocks[1:]) == len(blocks) - 1
        first.set()
        bench.wait(1)
        time.sleep(0.3)
        assert bench.tier.restore_seconds(1) is None
        files.go.set()
        bench.wait(len(blocks) - 1)
        wait_for_measurement(bench)


def test_a_disk_that_is_written_to_for_long_is_measured_all_the_same_but_later(tmp_path):
    limits = replace(LIMITS, measure_s=0.5)
    with Bench(tmp_path, limits=limits, open_files=FaultyFiles) as bench:
        at = time.monotonic()
        bench.spill_numbers(GLOBAL, range(8))
        wait_for_measurement(bench)
        measured = bench.store.statistics().fetches[Outcome.DONE]
        (files,) = bench.files
        files.blocked.add("write")
        bench.tier.spill([bench.put(GLOBAL, 9, 9)])
        while bench.store.statistics().fetches[Outcome.DONE] == measured:
            assert time.monotonic() < at + 10
            time.sleep(0.001)
        assert time.monotonic() - at > 0.75, "due after 0.5 s, it waits for the end of the writing, but not for ever"
        files.go.set()
        bench.wait(1)


def test_stores_that_fail_say_nothing_of_how_fast_the_disk_is(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(8))
        fast = bench.tier.statistics().spill_bytes_per_second
        assert fast is not None
        (files,) = bench.files
        files.errors["write"] = errno.EIO
        assert Outcome.DONE not in bench.spill_numbers(GLOBAL, range(10, 40), at_once=10)
        assert bench.tier.statistics().spill_bytes_per_second == fast


def test_a_disk_that_was_slow_is_found_to_be_well_again(tmp_path):
    limits = ColdTierLimits(tray_bytes=1 << 14, trays=3, measure_s=0.02)
    with Bench(tmp_path, limits=limits, open_files=FaultyFiles, read_deadline_s=0.3) as bench:
        bench.spill_numbers(GLOBAL, range(8))
        wait_for_measurement(bench)
        well = bench.tier.restore_seconds(1 << 14)
        (files,) = bench.files
        files.blocked.add("read")
        assert set(bench.restore(slot_blocks(GLOBAL, range(8)))) == {Outcome.LATE}
        slow = bench.tier.restore_seconds(1 << 14)
        assert well is not None
        assert slow is not None
        assert slow > 0.1
        assert set(bench.restore(slot_blocks(GLOBAL, range(8)))) == {Outcome.LATE}
        assert bench.tier.restore_seconds(1 << 14) == slow, "a store that gives up at once is not fast"
        files.blocked.clear()
        files.go.set()
        end = time.monotonic() + 10
        while (bench.tier.restore_seconds(1 << 14) or 0) > slow / 5:
            assert time.monotonic() < end
            time.sleep(0.01)
