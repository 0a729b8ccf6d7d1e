"""Failing disks, damaged records and bugs under the cold tier: misses, each reported once, and it goes on."""

import errno
import logging
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cold_tier_bench import GLOBAL, LOCAL, SLOTS, Bench, name, silent_disk, slot_blocks, wait_for_measurement
from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.cold_tier import (
    worker,
)
from wicore_backend.hmt.cold_tier.restore_worker import RestoreWorker
from wicore_backend.hmt.cold_tier.spill_worker import SpillWorker
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome
from wicore_backend.hmt.policy import Access
from wicore_backend.hmt.policy.lru import LRU

# Bugs.


def test_a_codec_that_fails_is_a_failure_of_its_batch(tmp_path, monkeypatch):
    with Bench(tmp_path, "q8") as bench:

        def fail(*_, **__):
            raise RuntimeError("no memory")

        bench.spill([bench.put(GLOBAL, 1, 0)])
        monkeypatch.setattr(bench.codecs[GLOBAL], "encode", fail)
        monkeypatch.setattr(bench.codecs[GLOBAL], "decode", fail)
        assert bench.spill([bench.put(GLOBAL, 2, 1), bench.put(GLOBAL, 3, 2)]) == [Outcome.FAILED] * 2
        assert bench.restore([SlotBlock(GLOBAL, name(1), 3)]) == [Outcome.FAILED]
        monkeypatch.undo()
        assert bench.restore([SlotBlock(GLOBAL, name(1), 3)]) == [Outcome.DONE]
        bench.tier.check_integrity()


@pytest.mark.parametrize("failing", ["add", "use", "evict", "admit", "observe", "attend"])
def test_a_policy_that_raises_gives_way_to_a_plain_one_and_no_block_is_lost(tmp_path, failing, caplog):
    class Broken(LRU):
        calls = 0

        def __getattribute__(self, item):
            if item == failing and type(self).calls > 2:
                raise RuntimeError("a bug")
            type(self).calls += item == failing
            return super().__getattribute__(item)

    with Bench(tmp_path, capacity_bytes=200_000, policy=Broken) as bench:
        for _ in range(4):
            bench.tier.observe(Access(keys=[(GLOBAL, name(1))]))
            bench.tier.attend([(GLOBAL, name(1))], [1.0])
        assert set(bench.spill_numbers(GLOBAL, range(60))) <= {Outcome.DONE, Outcome.HELD}
        held = [number for number in range(60) if bench.tier.holds(GLOBAL, name(number))]
        assert len(held) > 10
        assert (
            bench.restore([SlotBlock(GLOBAL, name(n), slot) for slot, n in enumerate(held[:8])]) == [Outcome.DONE] * 8
        )
        bench.tier.check_integrity()
    assert [record.message for record in caplog.records] == ["cold_tier_policy_failed"]


@pytest.mark.parametrize("where", ["spill", "restore"])
@pytest.mark.parametrize("step", ["names", "store", "landing", "books"])
def test_a_bug_amid_a_batch_loses_its_blocks_and_each_is_reported_once(tmp_path, monkeypatch, where, step):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(6))
        if step == "names":
            monkeypatch.setattr(worker, "record_name", fail)
        elif step == "store":
            monkeypatch.setattr(bench.store, "store_all" if where == "spill" else "fetch", fail)
        elif step == "landing":
            monkeypatch.setattr(SpillWorker, "_measure", fail)
            monkeypatch.setattr(RestoreWorker, "_teaches", fail)
        else:
            method = "stored" if where == "spill" else "unpin"
            noted = getattr(bench.tier._books, method)
            monkeypatch.setattr(bench.tier._books, method, lambda *what: fail(noted(*what)))
        if where == "spill":
            bench.tier.spill([bench.put(GLOBAL, number, number) for number in range(10, 16)])
        else:
            bench.tier.restore(slot_blocks(GLOBAL, range(6)))
        reports = bench.wait(6)
        assert len({report.block for report in reports}) == 6
        assert step == "landing" or {report.outcome for report in reports} == {Outcome.FAILED}
        monkeypatch.undo()
        assert bench.spill([bench.put(LOCAL, 1, 0)]) == [Outcome.DONE]
        assert bench.restore([SlotBlock(LOCAL, name(1), 5)]) == [Outcome.DONE]


# Disks.


def damage(directory: Path) -> None:
    """Change a byte of every page."""
    with open(directory / "slots", "r+b") as file:
        content = bytearray(file.read())
        content[::4096] = bytes(byte ^ 1 for byte in content[::4096])
        file.seek(0)
        file.write(content)


def test_a_damaged_record_is_a_miss_once_and_then_unknown(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(6))
    damage(tmp_path)
    # The tier's own measurement at the opening may be the one that finds the damage.
    with Bench(tmp_path) as bench:
        up = slot_blocks(GLOBAL, range(6))
        assert set(bench.restore(up)) <= {Outcome.CORRUPT, Outcome.MISSING}
        assert not any(bench.tier.holds(GLOBAL, name(number)) for number in range(6))
        assert set(bench.restore(up)) == {Outcome.MISSING}
        assert bench.tier.statistics().groups[GLOBAL].lost == 6
        bench.tier.check_integrity()
        assert set(bench.spill_numbers(GLOBAL, range(6))) == {Outcome.DONE}
        assert set(bench.restore(up)) == {Outcome.DONE}


def test_of_a_batch_only_the_damaged_records_are_misses(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(20))
        wait_for_measurement(bench)
        slot_bytes = bench.store.config.slot_bytes
        with open(tmp_path / "slots", "r+b") as file:
            for slot in (3, 4, 11):
                file.seek(slot * slot_bytes)
                byte = file.read(1)
                file.seek(slot * slot_bytes)
                file.write(bytes([byte[0] ^ 0x40]))
        up = [SlotBlock(GLOBAL, name(number), (7 * number) % SLOTS) for number in range(20)]
        outcomes = bench.restore(up)
        assert Counter(outcomes) == {Outcome.DONE: 17, Outcome.CORRUPT: 3}
        assert all(bench.right(b) for b, outcome in zip(up, outcomes, strict=True) if outcome is Outcome.DONE)
        bench.tier.check_integrity()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_takes_nothing_is_a_refusal_and_one_log_line(tmp_path, caplog, error):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(3))
        (files,) = bench.files
        files.errors["write"] = error
        outcomes = bench.spill_numbers(GLOBAL, range(10, 60))
        assert set(outcomes) <= {Outcome.FAILED, Outcome.REFUSED}
        assert bench.tier.statistics().groups[GLOBAL].refused == 50
        assert bench.tier.statistics().held[GLOBAL] == 3
        assert set(bench.restore(slot_blocks(GLOBAL, range(3)))) == {Outcome.DONE}
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        bench.tier.check_integrity()


def test_a_disk_that_gives_nothing_is_misses(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(10))
        (files,) = bench.files
        files.errors["read"] = errno.EIO
        up = slot_blocks(GLOBAL, range(10))
        assert set(bench.restore(up)) <= {Outcome.FAILED, Outcome.MISSING}
        files.errors.clear()
        assert set(bench.restore(up)) == {Outcome.MISSING}, "an unreadable record is not asked for again"
        assert bench.spill([bench.put(GLOBAL, 1, 1)]) == [Outcome.DONE]
        bench.tier.check_integrity()


def test_deleted_files_are_misses(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(5))
        wait_for_measurement(bench)
        for file in tmp_path.iterdir():
            file.unlink()
        up = slot_blocks(GLOBAL, range(4))
        assert set(bench.restore(up)) == {Outcome.MISSING}
        assert bench.spill([bench.put(GLOBAL, 7, 7)]) == [Outcome.REFUSED]
        assert bench.tier.statistics().groups[GLOBAL].restores == {Outcome.MISSING: 4}
        bench.tier.check_integrity()


def test_a_silent_disk_is_late_and_its_slots_come_back_untouched(tmp_path):
    with silent_disk(tmp_path) as (bench, files):
        bench.slots[GLOBAL].fill_(3)
        up = slot_blocks(GLOBAL, range(SLOTS))
        started = time.perf_counter()
        first = bench.tier.restore(up[:20], 1.5)
        second = bench.tier.restore(up[20:], 0.1)  # Finds no tray, and waits for its own deadline alone.
        ended = bench.wait(4)
        assert 0.1 <= time.perf_counter() - started < 1.5
        assert second.done
        ended += bench.wait(20)
        assert 1.5 <= time.perf_counter() - started < 4.5
        assert first.done
        assert {done.outcome for done in ended} == {Outcome.LATE}
        files.blocked.clear()
        files.go.set()
        bench.spill([bench.put(LOCAL, 1, 1)])
        assert (bench.slots[GLOBAL] == 3).all()
        assert set(bench.restore(up)) == {Outcome.DONE}, "late records are still held"
        bench.tier.check_integrity()


def test_a_write_that_hangs_is_no_record_and_gives_its_slot_back(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles, write_deadline_s=0.5) as bench:
        (files,) = bench.files
        files.blocked.add("write")
        assert bench.spill([bench.put(GLOBAL, 1, 0)]) == [Outcome.LATE]
        assert not bench.tier.holds(GLOBAL, name(1))
        files.blocked.clear()
        files.go.set()
        end = time.monotonic() + 10
        while bench.spill([bench.put(GLOBAL, 1, 0)]) != [Outcome.DONE]:  # Its thread has to come back first.
            assert time.monotonic() < end
        assert bench.restore([SlotBlock(GLOBAL, name(1), 2)]) == [Outcome.DONE]
        assert bench.right(SlotBlock(GLOBAL, name(1), 2))
