"""Cancelling a restore, and closing the cold tier: what ends, at once, and with its slots given back."""

import threading
import time
from collections import Counter
from dataclasses import replace

from tests.cold_tier_bench import (
    GLOBAL,
    LIMITS,
    LOCAL,
    SLOTS,
    Bench,
    name,
    silent_disk,
    slot_blocks,
    wait_for_measurement,
)
from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome


def test_a_cancelled_restore_ends_without_the_disk_and_touches_its_slots_no_more(tmp_path):
    with silent_disk(tmp_path) as (bench, files):
        bench.slots[GLOBAL].fill_(3)
        restore = bench.tier.restore(slot_blocks(GLOBAL, range(SLOTS)))
        assert files.entered.acquire(timeout=5)
        assert not restore.done
        restore.cancel()
        ended = bench.wait(SLOTS, timeout_s=1)
        assert {done.outcome for done in ended} == {Outcome.CANCELLED}
        assert {done.restore for done in ended} == {restore}
        assert restore.done
        restore.cancel()
        files.blocked.clear()
        files.go.set()
        time.sleep(0.05)
        assert (bench.slots[GLOBAL] == 3).all()
        bench.tier.check_integrity()
        up = slot_blocks(GLOBAL, range(SLOTS))
        assert set(bench.restore(up)) == {Outcome.DONE}


def test_a_cancel_cuts_what_is_read_but_not_what_is_being_decoded(tmp_path, monkeypatch):
    with Bench(
        tmp_path, "q8", limits=replace(LIMITS, tray_bytes=LIMITS.tray_bytes * 9 // 16, decode_threads=1)
    ) as bench:
        bench.spill_numbers(GLOBAL, range(16))
        wait_for_measurement(bench)
        decode = bench.codecs[GLOBAL].decode
        entered, go = threading.Event(), threading.Event()

        def held_up(*args, **kwargs):
            entered.set()
            assert go.wait(10)
            decode(*args, **kwargs)

        monkeypatch.setattr(bench.codecs[GLOBAL], "decode", held_up)
        bench.slots[GLOBAL].fill_(3)
        restore = bench.tier.restore(slot_blocks(GLOBAL, range(16)))
        assert entered.wait(10)
        end = time.monotonic() + 5
        while bench.store.statistics().fetches[Outcome.DONE] < 16:  # Both batches of 8 are read.
            assert time.monotonic() < end
        restore.cancel()
        go.set()
        outcomes = {done.block.slot: done.outcome for done in bench.wait(16)}
        assert Counter(outcomes.values()) == {Outcome.DONE: 8, Outcome.CANCELLED: 8}
        for slot, outcome in outcomes.items():  # Which ones were read first is the disk's to say.
            if outcome is Outcome.DONE:
                assert bench.right(SlotBlock(GLOBAL, name(slot), slot))
            else:
                assert (bench.slots[GLOBAL][slot] == 3).all()


def test_a_cancel_concerns_its_own_restore_alone(tmp_path):
    with silent_disk(tmp_path) as (bench, files):
        up = slot_blocks(GLOBAL, range(SLOTS))
        one, two = bench.tier.restore(up[:10]), bench.tier.restore(up[10:])
        one.cancel()
        assert {done.restore for done in bench.wait(10)} == {one}
        files.go.set()
        ended = bench.wait(SLOTS - 10)
        assert {(done.restore, done.outcome) for done in ended} == {(two, Outcome.DONE)}
        assert all(bench.right(block) for block in up[10:])


def test_one_record_can_be_restored_to_several_slots_at_once(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill([bench.put(GLOBAL, 1, 0)])
        wait_for_measurement(bench)
        (files,) = bench.files
        files.blocked.add("read")
        up = [SlotBlock(GLOBAL, name(1), slot) for slot in range(1, 4)]
        restores = [bench.tier.restore([block]) for block in up]
        restores[0].cancel()
        assert [done.outcome for done in bench.wait(1)] == [Outcome.CANCELLED]
        bench.tier.check_integrity()
        files.go.set()
        assert [done.outcome for done in bench.wait(2)] == [Outcome.DONE] * 2
        assert bench.right(up[1])
        assert bench.right(up[2])


# Closing.


def test_closing_under_load_finishes_what_is_under_way_and_takes_no_more(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(LOCAL, range(SLOTS))
        down = [bench.put(GLOBAL, slot, slot) for slot in range(SLOTS)]
        up = slot_blocks(LOCAL, range(SLOTS))
        bench.tier.spill(down)
        restore = bench.tier.restore(up)
        bench.tier.close()
        ended = bench.tier.finished()
        assert Counter(done.outcome for done in ended) == {Outcome.DONE: 2 * SLOTS}
        assert restore.done
        assert all(bench.right(block) for block in up)
        assert bench.tier.spill(down) == 0
        late = bench.tier.restore(up[:1])
        assert [done.outcome for done in bench.tier.finished()] == [Outcome.CLOSED]
        assert late.done
        bench.tier.close()
    with Bench(tmp_path) as bench:
        assert bench.tier.statistics().held == {GLOBAL: SLOTS, LOCAL: SLOTS}


def test_closing_while_the_disk_hangs_cuts_what_is_under_way(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(LOCAL, range(SLOTS))
        wait_for_measurement(bench)
        (files,) = bench.files
        files.blocked |= {"read", "write"}
        bench.tier.spill([bench.put(GLOBAL, slot, slot) for slot in range(SLOTS)])
        bench.tier.restore(slot_blocks(LOCAL, range(SLOTS)))
        started = time.perf_counter()
        bench.tier.close(timeout_s=0.1)
        assert time.perf_counter() - started < 4  # The disk has 5.
        outcomes = {done.outcome for done in bench.tier.finished()}
        assert outcomes <= {Outcome.CLOSED, Outcome.CANCELLED}
        assert not bench.tier.busy


def test_closing_does_not_wait_for_a_copy_that_never_ends(tmp_path, caplog):
    with Bench(tmp_path) as bench:
        never = threading.Event()
        bench.tier.spill([bench.put(GLOBAL, 1, 1)], lambda: never.wait(30) and None)
        started = time.perf_counter()
        bench.tier.close(timeout_s=0.1)
        assert time.perf_counter() - started < 10
        assert any("cold_tier_left_running" in record.getMessage() for record in caplog.records)
        assert bench.tier.busy
        never.set()
        assert [done.outcome for done in bench.wait(1)] == [Outcome.CLOSED]
        assert not bench.tier.holds(GLOBAL, name(1))


def test_a_loop_that_cannot_be_woken_loses_no_report(tmp_path):
    def fail():
        raise RuntimeError("mine")

    with Bench(tmp_path) as bench:
        bench.tier._woken = fail
        bench.tier.spill([bench.put(GLOBAL, 1, 1)])
        end = time.monotonic() + 5
        while not (ended := bench.tier.finished()):
            assert time.monotonic() < end
        assert [done.outcome for done in ended] == [Outcome.DONE]
