"""Disks that fail, hang or vanish under the NVMe store: misses, counters, one log line, and nobody waits."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from tests.nvme_kit import SLOT, FaultyFiles, config, faulty_store, get, name, payload, put, warnings
from wicore_backend.hmt.nvme import (
    NvmeStore,
    Outcome,
    StoreInUseError,
    Ticket,
    Trouble,
)


@pytest.fixture
def faulty(tmp_path):
    with faulty_store(tmp_path) as store_and_files:
        yield store_and_files


@pytest.mark.parametrize("part", ["write", "headers"])
@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (errno.ENOSPC, Trouble.DISK_FULL),
        (errno.EDQUOT, Trouble.DISK_FULL),
        (errno.EROFS, Trouble.PERMISSION),
        (errno.EACCES, Trouble.PERMISSION),
        (errno.EIO, Trouble.WRITE_ERROR),
    ],
)
def test_a_failed_write_is_no_record_and_one_log_line_and_passes(faulty, caplog, part, error, trouble):
    store, files = faulty
    assert put(store, 1) is Outcome.DONE
    files.errors[part] = error
    assert put(store, 2) is Outcome.FAILED
    assert put(store, 3) is Outcome.REFUSED
    store._ledger._refuse_until = 0.0  # An hour later.
    assert put(store, 2) is Outcome.FAILED
    assert get(store, 2) is Outcome.MISSING
    assert get(store, 1) is Outcome.DONE
    assert store.statistics().troubles == {trouble: 2}
    (line,) = warnings(caplog)
    assert f"kind={trouble} directory={store.config.directory}" in line
    files.errors.clear()
    store._ledger._refuse_until = 0.0  # An hour later.
    assert put(store, 2) is Outcome.DONE
    assert get(store, 2) is Outcome.DONE
    store.check_integrity()


def test_a_failed_read_is_a_miss_and_its_place_is_not_used_again(faulty, caplog):
    store, files = faulty
    for number in range(3):
        put(store, number)
    used = store.statistics().used_bytes
    files.errors["read"] = errno.EIO
    assert get(store, 0) is Outcome.FAILED
    assert get(store, 1) is Outcome.FAILED
    files.errors.clear()
    assert get(store, 0) is Outcome.MISSING
    assert get(store, 2) is Outcome.DONE
    assert store.statistics().used_bytes == used
    assert store.statistics().troubles == {Trouble.READ_ERROR: 2}
    assert len(warnings(caplog)) == 1
    store.check_integrity()


def test_of_records_that_are_read_together_a_bad_place_costs_the_one_that_lies_there(tmp_path):
    class BadPlace(FaultyFiles):
        def read(self, run, into):
            if run.start <= 2 < run.stop:
                raise OSError(errno.EIO, "a bad place")
            super().read(run, into)

    with NvmeStore(config(tmp_path, read_threads=1, read_deadline_s=10.0), open_files=BadPlace) as store:
        for number in range(6):  # Each a slot, one after the other.
            assert put(store, number) is Outcome.DONE
        buffers = [bytearray(SLOT) for _ in range(6)]
        ticket = store.fetch([name(number) for number in range(6)], buffers)
        assert ticket.wait(10)
        assert ticket.outcomes == (*[Outcome.DONE] * 2, Outcome.FAILED, *[Outcome.DONE] * 3)
        assert all(bytes(buffers[number]) == payload(number, SLOT) for number in (0, 1, 3, 4, 5))
        assert store.statistics().troubles == {Trouble.READ_ERROR: 1}
        store.check_integrity()


def test_headers_that_cannot_be_read_are_records_that_are_missing(tmp_path, caplog):
    with NvmeStore(config(tmp_path)) as store:
        put(store, 1)

    class Unreadable(FaultyFiles):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.errors["scan"] = errno.EIO

    with NvmeStore(config(tmp_path), open_files=Unreadable) as store:
        assert get(store, 1) is Outcome.MISSING
        assert put(store, 2) is Outcome.DONE
        assert store.statistics().troubles == {Trouble.READ_ERROR: 1}
    assert len(warnings(caplog)) == 1


def test_a_read_that_hangs_is_late_and_never_writes_to_the_callers_memory(faulty):
    store, files = faulty
    for number in range(4):
        put(store, number)
    files.blocked.add("read")
    started = time.perf_counter()
    assert get(store, 0) is Outcome.LATE
    assert 1 <= time.perf_counter() - started < 5
    buffer = bytearray(SLOT)
    ticket = store.fetch([name(1)], [buffer])
    assert ticket.wait(5)
    assert ticket.outcomes == (Outcome.LATE,)
    # Both threads are in the kernel now: nobody waits for a deadline again, and stores go on.
    assert store.fetch([name(2)], [bytearray(SLOT)]).done
    assert get(store, 2) is Outcome.LATE
    assert put(store, 5) is Outcome.DONE
    assert store.delete(name(0))
    store.check_integrity()
    files.blocked.clear()
    files.go.set()
    deadline = time.monotonic() + 5
    while get(store, 2) is not Outcome.DONE:
        assert time.monotonic() < deadline
    assert bytes(buffer) == bytes(SLOT)
    assert get(store, 1) is Outcome.DONE
    store.check_integrity()


def test_what_waits_behind_hanging_reads_ends_with_them(faulty):
    store, files = faulty
    for number in range(10):
        put(store, number)
    files.blocked.add("read")
    started = time.perf_counter()
    ticket = store.fetch([name(number) for number in range(10)], [bytearray(SLOT) for _ in range(10)])
    assert ticket.wait(5)
    assert time.perf_counter() - started < 5
    assert set(ticket.outcomes) == {Outcome.LATE}
    files.go.set()


def test_a_fetch_ends_by_the_callers_own_deadline(tmp_path):
    with faulty_store(tmp_path, read_deadline_s=30.0) as (store, files):
        put(store, 1)
        files.blocked.add("read")
        ticket = store.fetch([name(1)], [bytearray(SLOT)], deadline_s=0.02)
        assert ticket.wait(20), "it waited for the store's"
        assert ticket.outcomes == (Outcome.LATE,)
        files.go.set()


@pytest.mark.parametrize("part", ["write", "headers"])
def test_a_write_that_hangs_gives_the_memory_back_and_stays_unseen(faulty, part):
    store, files = faulty
    put(store, 0)
    files.blocked.add(part)
    memory = bytearray(payload(1, SLOT))
    ticket = store.store(name(1), memory)
    assert ticket.wait(5)
    assert ticket.outcomes == (Outcome.LATE,)
    memory[:] = bytes(SLOT)  # The caller's again, while the thread still is in the kernel with it.
    assert get(store, 1) is Outcome.MISSING
    assert get(store, 0) is Outcome.DONE
    store.check_integrity()
    files.blocked.clear()
    files.go.set()
    deadline = time.monotonic() + 5
    while put(store, 1) is not Outcome.DONE:
        assert time.monotonic() < deadline
    assert get(store, 1) is Outcome.DONE
    store.check_integrity()


def test_a_store_whose_disk_hangs_closes_and_keeps_its_directory_to_itself(tmp_path):
    opened = []

    def open_files(*args, **kwargs):
        opened.append(FaultyFiles(*args, **kwargs))
        return opened[-1]

    store = NvmeStore(config(tmp_path, read_deadline_s=0.05), open_files=open_files)
    put(store, 1)
    opened[0].blocked.add("read")
    assert get(store, 1) is Outcome.LATE
    started = time.perf_counter()
    store.close(timeout_s=0.1)
    assert time.perf_counter() - started < 5
    assert get(store, 1) is Outcome.CLOSED
    with pytest.raises(StoreInUseError):
        NvmeStore(config(tmp_path))
    opened[0].go.set()


def test_deleted_files_are_an_empty_store_that_gives_the_space_back(faulty, caplog):
    store, files = faulty
    for number in range(5):
        put(store, number)
    shutil.rmtree(store.config.directory)
    assert get(store, 1) is Outcome.MISSING
    assert put(store, 9) is Outcome.REFUSED
    assert not store.records()
    assert os.fstat(files._data).st_blocks == 0
    assert len(warnings(caplog)) == 1
    store.check_integrity()
    with NvmeStore(store.config) as fresh:
        assert put(fresh, 1) is Outcome.DONE


def test_files_cut_short_while_open_are_misses(faulty):
    store, _ = faulty
    for number in range(5):
        put(store, number)
    os.truncate(store.config.directory / "slots", 2 * SLOT + 100)
    outcomes = [get(store, number) for number in range(5)]
    assert outcomes == [Outcome.DONE, Outcome.DONE, Outcome.FAILED, Outcome.FAILED, Outcome.FAILED]
    assert put(store, 10) is Outcome.DONE
    assert get(store, 10) is Outcome.DONE
    store.check_integrity()


def test_a_real_limit_on_file_size_is_a_full_disk(tmp_path):
    program = """
        import resource, sys
        from pathlib import Path
        from tests.nvme_kit import SLOT, config, get, put
        from wicore_backend.hmt.nvme import NvmeStore, Outcome, Trouble
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
        store = NvmeStore(config(Path(sys.argv[1]), preallocate=False, retry_s=0.001))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * SLOT, resource.RLIM_INFINITY))
        outcomes = [put(store, number) for number in range(100)]
        done = [number for number, outcome in enumerate(outcomes) if outcome is Outcome.DONE]
        assert 10 < len(done) < 25, outcomes
        assert set(outcomes) <= {Outcome.DONE, Outcome.FAILED, Outcome.REFUSED}
        assert set(store.statistics().troubles) == {Trouble.DISK_FULL}
        assert all(get(store, number) is Outcome.DONE for number in done)
        store.check_integrity()
        store.close()
        print("right")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


# Cancelled, or deleted, while the disk has it.


def test_a_cancelled_fetch_ends_at_once_and_its_buffer_stays_the_callers(faulty):
    store, files = faulty
    for number in range(6):
        put(store, number)
    files.blocked.add("read")
    buffers = [bytearray(SLOT) for _ in range(6)]
    told: list[Ticket] = []
    ticket = store.fetch([name(number) for number in range(6)], buffers, done=told.append)
    assert files.entered.acquire(timeout=5)
    ticket.cancel()
    assert ticket.done
    assert set(ticket.outcomes) == {Outcome.CANCELLED}
    ticket.cancel()
    files.blocked.clear()
    files.go.set()
    assert get(store, 5) is Outcome.DONE
    assert buffers == [bytearray(SLOT)] * 6
    assert told == [ticket]
    store.check_integrity()


def test_a_cancelled_store_leaves_no_record_and_its_name_free(faulty):
    store, files = faulty
    files.blocked.add("write")
    tickets = [store.store(name(number), payload(number, SLOT)) for number in range(4)]
    assert files.entered.acquire(timeout=5)
    for ticket in tickets:
        ticket.cancel()
        assert ticket.outcomes == (Outcome.CANCELLED,)
    files.blocked.clear()
    files.go.set()
    assert [put(store, number) for number in range(4)] == [Outcome.DONE] * 4
    assert [get(store, number) for number in range(4)] == [Outcome.DONE] * 4
    store.check_integrity()


def test_a_record_deleted_while_it_is_written_or_read_is_gone(faulty):
    store, files = faulty
    files.blocked.add("write")
    ticket = store.store(name(1), payload(1, SLOT))
    assert files.entered.acquire(timeout=5)
    assert store.delete(name(1))
    files.blocked = {"read"}
    files.go.set()
    assert ticket.wait(5)
    assert ticket.outcomes == (Outcome.CANCELLED,)
    assert get(store, 1) is Outcome.MISSING
    files.go.clear()
    put(store, 2)
    buffer = bytearray(SLOT)
    ticket = store.fetch([name(2)], [buffer])
    assert files.entered.acquire(timeout=5)
    used = store.statistics().used_bytes
    assert store.delete(name(2))
    assert store.statistics().used_bytes == used, "the slots are the read's until it is over"
    files.go.set()
    assert ticket.wait(5)
    assert ticket.outcomes == (Outcome.DONE,)
    assert buffer == payload(2, SLOT)
    store.check_integrity()
