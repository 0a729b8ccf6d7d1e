"""The NVMe store: what is fetched is what was stored, or nothing; the bound holds; trouble never reaches the caller."""

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.nvme import (
    NvmeConfig,
    NvmeStore,
    Outcome,
    StoreFiles,
    StoreInUseError,
    StoreUnusableError,
    Ticket,
    Trouble,
)
from wicore_backend.hmt.nvme import files as nvme_files
from wicore_backend.hmt.nvme.files import PAGE, aligned_buffer
from wicore_backend.hmt.nvme.index import Index
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record, fingerprint_of, scan
from wicore_backend.hmt.nvme.space import FreeSpace, Run

SLOT = 8192
MAX = 5 * SLOT
SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, SLOT, SLOT + 1, 3 * SLOT, MAX - 1, MAX]


def config(directory: Path, **changes) -> NvmeConfig:
    values = {
        "directory": directory,
        "capacity_bytes": 1 << 20,
        "slot_bytes": SLOT,
        "max_payload_bytes": MAX,
        "fingerprint": b"gemma3 float32",
        "read_threads": 2,
        "write_threads": 2,
    }
    return NvmeConfig(**{**values, **changes})


def name(number: int, length: int = 16) -> bytes:
    return number.to_bytes(length, "little")


def payload(number: int, size: int) -> bytes:
    return np.random.default_rng(number).bytes(size)


def put(store: NvmeStore, number: int, size: int = SLOT) -> Outcome:
    ticket = store.store(name(number), payload(number, size))
    assert ticket.wait(10)
    (outcome,) = ticket.outcomes
    assert outcome is not None
    return outcome


def get(store: NvmeStore, number: int, size: int = SLOT) -> Outcome:
    """The outcome of a fetch, after a look at the buffer: right if done, untouched unless it was corrupt."""
    before = b"\xaa" * size
    buffer = bytearray(before)
    ticket = store.fetch([name(number)], [buffer])
    assert ticket.wait(10)
    (outcome,) = ticket.outcomes
    assert outcome is not None
    if outcome is not Outcome.CORRUPT:
        assert buffer == (payload(number, size) if outcome is Outcome.DONE else before)
    return outcome


def taken(directory: Path) -> int:
    """Bytes of the store's files, each in whole pages."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in directory.iterdir())


# What is stored is what is fetched.


@pytest.mark.parametrize("length", [16, 32])
def test_records_of_every_length_come_back_and_again_after_a_restart(tmp_path, length):
    records = {name(number, length): payload(number, size) for number, size in enumerate(SIZES)}
    for _ in range(2):
        with NvmeStore(config(tmp_path)) as store:
            for key, content in records.items():
                assert store.store(key, content).wait(10)
            buffers = [bytearray(len(content)) for content in records.values()]
            ticket = store.fetch(list(records), buffers)
            assert ticket.wait(10)
            assert set(ticket.outcomes) == {Outcome.DONE}
            assert buffers == list(records.values())
            assert [record.name for record in store.records()] == list(records)
            store.check_integrity()


@pytest.mark.parametrize("offset", [0, 64, 1])
@pytest.mark.parametrize("size", SIZES)
def test_payloads_and_buffers_may_lie_anywhere_in_memory(tmp_path, offset, size):
    memory = memoryview(aligned_buffer(MAX + PAGE))[offset : offset + size]
    memory[:] = payload(1, size)
    with NvmeStore(config(tmp_path)) as store:
        assert store.store(name(1), memory).wait(10)
        memory[:] = bytes(size)
        assert store.fetch([name(1)], [memory]).wait(10)
        assert memory == payload(1, size)


def test_records_lie_in_pieces_where_the_space_does(tmp_path):
    with NvmeStore(config(tmp_path, capacity_bytes=2 * PAGE + 10 * (SLOT + HEADER_BYTES))) as store:
        assert [put(store, number) for number in range(10)] == [Outcome.DONE] * 10
        for number in (1, 3, 5, 6, 9):
            assert store.delete(name(number))
        assert put(store, 100, 5 * SLOT - 7) is Outcome.DONE
        assert get(store, 100, 5 * SLOT - 7) is Outcome.DONE
        assert all(get(store, number) is Outcome.DONE for number in (0, 2, 4, 7, 8))
        store.check_integrity()
    with NvmeStore(config(tmp_path, capacity_bytes=2 * PAGE + 10 * (SLOT + HEADER_BYTES))) as store:
        assert get(store, 100, 5 * SLOT - 7) is Outcome.DONE
        store.check_integrity()


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_without_direct_io_does_too(tmp_path, monkeypatch, call):
    real = getattr(os, call)

    def refuse(target, argument, *rest):
        flags = argument if call == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, argument, *rest)

    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(nvme_files, "_SYNC_EVERY", 3 * SLOT)
    with NvmeStore(config(tmp_path)) as store:
        assert [put(store, number, size) for number, size in enumerate(SIZES)] == [Outcome.DONE] * len(SIZES)
        assert [get(store, number, size) for number, size in enumerate(SIZES)] == [Outcome.DONE] * len(SIZES)


def test_a_name_is_stored_once_and_found_only_with_its_length(tmp_path):
    with NvmeStore(config(tmp_path)) as store:
        assert put(store, 1) is Outcome.DONE
        assert put(store, 1) is Outcome.HELD
        assert get(store, 1, SLOT - 1) is Outcome.MISSING
        assert get(store, 2) is Outcome.MISSING
        assert name(1) in store
        assert name(2) not in store


def test_mistakes_of_the_caller_are_errors_at_once(tmp_path):
    with NvmeStore(config(tmp_path)) as store:
        with pytest.raises(ValueError, match="a name of 15 bytes"):
            store.store(bytes(15), b"")
        with pytest.raises(ValueError, match=f"max_payload_bytes is {MAX}"):
            store.store(name(1), bytes(MAX + 1))
        with pytest.raises(ValueError, match="1 names and 2 buffers"):
            store.fetch([name(1)], [bytearray(1), bytearray(1)])
        with pytest.raises(ValueError, match="read-only"):
            store.fetch([name(1)], [b"1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_bytes": 1000}, "multiple of 4096"),
        ({"capacity_bytes": 3 * SLOT}, "raise it"),
        ({"read_threads": 0}, "read_threads is 0"),
        ({"capacity_bytes": 1 << 60}, "raise slot_bytes"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_the_remedy(tmp_path, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        config(tmp_path, **changes)


# Restarts.


def test_another_fingerprint_sees_an_empty_store(tmp_path):
    with NvmeStore(config(tmp_path)) as store:
        assert [put(store, number) for number in range(50)] == [Outcome.DONE] * 50
    with NvmeStore(config(tmp_path, fingerprint=b"gemma3 bfloat16")) as store:
        assert not store.records()
        assert get(store, 1) is Outcome.MISSING
        assert [put(store, number, SLOT - 1) for number in range(100, 200)] == [Outcome.DONE] * 100
    with NvmeStore(config(tmp_path)) as store:
        assert not store.records()
        assert put(store, 1) is Outcome.DONE
        assert get(store, 1) is Outcome.DONE


def test_a_deleted_record_stays_away_after_a_restart(tmp_path):
    with NvmeStore(config(tmp_path)) as store:
        put(store, 1)
        put(store, 2)
        assert store.delete(name(1))
        assert not store.delete(name(1))
        assert get(store, 1) is Outcome.MISSING
    with NvmeStore(config(tmp_path)) as store:
        assert [record.name for record in store.records()] == [name(2)]


def test_a_store_can_be_opened_with_another_capacity(tmp_path):
    with NvmeStore(config(tmp_path)) as store:
        for number in range(100):
            put(store, number)
    with NvmeStore(config(tmp_path, capacity_bytes=1 << 19)) as store:
        assert 0 < len(store.records()) < 100
        assert taken(tmp_path) <= 1 << 19
        assert all(get(store, record.name[0]) is Outcome.DONE for record in store.records())
        store.check_integrity()
    with NvmeStore(config(tmp_path, capacity_bytes=1 << 21)) as store:
        assert put(store, 1000) is Outcome.DONE
        store.check_integrity()


# The bound.


@pytest.mark.parametrize("preallocate", [True, False])
def test_the_files_never_exceed_the_capacity_and_a_full_store_says_so(tmp_path, preallocate):
    rng = np.random.default_rng(0)
    capacity = 300_000
    with NvmeStore(config(tmp_path, capacity_bytes=capacity, preallocate=preallocate)) as store:
        sizes = {}
        full = 0
        for number in range(300):
            size = int(rng.integers(0, MAX))
            outcome = put(store, number, size)
            if outcome is Outcome.DONE:
                sizes[number] = size
            while outcome is Outcome.FULL:
                full += 1
                victim = int(rng.choice(list(sizes)))
                del sizes[victim]
                assert store.delete(name(victim))
                outcome = put(store, number, size)
                if outcome is Outcome.DONE:
                    sizes[number] = size
            assert taken(tmp_path) <= capacity
            assert store.statistics().used_bytes <= capacity
        assert full > 100
        assert all(get(store, number, size) is Outcome.DONE for number, size in sizes.items())
        store.check_integrity()


# One process at a time.


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        from tests.test_nvme_store import config
        from wicore_backend.hmt.nvme import NvmeStore
        store = NvmeStore(config(Path(sys.argv[1])))
        print("open", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreInUseError, match=rf"{tmp_path} is in use by another process \(pid {other.pid}\)"):
            NvmeStore(config(tmp_path))
        other.kill()
        other.wait()
    NvmeStore(config(tmp_path)).close()


def test_two_stores_of_one_process_are_kept_apart_too(tmp_path):
    with NvmeStore(config(tmp_path)):
        with pytest.raises(StoreInUseError):
            NvmeStore(config(tmp_path))
        (tmp_path / "lock").unlink()
        with pytest.raises(StoreInUseError, match=f"{tmp_path} is in use"):
            NvmeStore(config(tmp_path))


# Directories that cannot hold a store.


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusableError, match=rf"{tmp_path}/file/store cannot hold .* can write"):
        NvmeStore(config(tmp_path / "file" / "store"))


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    store = tmp_path / "store"
    store.mkdir()
    (store / "slots").symlink_to(victim)
    with pytest.raises(StoreUnusableError, match="cannot hold"):
        NvmeStore(config(store))
    assert victim.read_text() == "mine"


def test_more_than_the_disk_has_is_refused_at_the_start_and_takes_nothing(tmp_path):
    with pytest.raises(StoreUnusableError, match="lower its capacity or free space"):
        NvmeStore(config(tmp_path, capacity_bytes=1 << 44, slot_bytes=1 << 24))
    assert taken(tmp_path) <= PAGE
    NvmeStore(config(tmp_path)).close()


def test_the_files_are_their_owners_alone(tmp_path):
    NvmeStore(config(tmp_path / "new")).close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "new").iterdir())


# Disks in trouble.


class FaultyFiles(StoreFiles):
    """Files that fail, or wait until `go` is set, when told to."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.errors: dict[str, int] = {}
        self.blocked: set[str] = set()
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)

    def meet(self, what: str) -> None:
        if what in self.blocked:
            self.entered.release()
            assert self.go.wait(30)
        if what in self.errors:
            raise OSError(self.errors[what], os.strerror(self.errors[what]))

    def read(self, run, into):
        self.meet("read")
        super().read(run, into)

    def write(self, run, pieces):
        self.meet("write")
        super().write(run, pieces)

    def write_headers(self, slot, headers):
        self.meet("headers")
        super().write_headers(slot, headers)

    def read_headers(self, first, count):
        self.meet("scan")
        return super().read_headers(first, count)

    def sync(self):
        self.meet("sync")
        super().sync()


@pytest.fixture
def faulty(tmp_path):
    """A store on faulty files, and the files."""
    opened = []

    def open_files(*args, **kwargs):
        opened.append(FaultyFiles(*args, **kwargs))
        return opened[-1]

    shape = config(tmp_path / "store", retry_s=3600.0, read_deadline_s=0.3, write_deadline_s=0.3)
    with NvmeStore(shape, open_files=open_files) as store:
        yield store, opened[0]
        opened[0].errors.clear()
        opened[0].go.set()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


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
    store._refuse_until = 0.0  # An hour later.
    assert put(store, 2) is Outcome.FAILED
    assert get(store, 2) is Outcome.MISSING
    assert get(store, 1) is Outcome.DONE
    assert store.statistics().troubles == {trouble: 2}
    (line,) = warnings(caplog)
    assert f"kind={trouble} directory={store.config.directory}" in line
    files.errors.clear()
    store._refuse_until = 0.0  # An hour later.
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
    assert 0.3 <= time.perf_counter() - started < 2
    buffer = bytearray(SLOT)
    ticket = store.fetch([name(1)], [buffer])
    assert ticket.wait(5)
    assert ticket.outcomes == (Outcome.LATE,)
    # Both threads are in the kernel now: nobody waits for a deadline again, and stores go on.
    started = time.perf_counter()
    assert get(store, 2) is Outcome.LATE
    assert time.perf_counter() - started < 0.2
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
    assert time.perf_counter() - started < 2
    assert set(ticket.outcomes) == {Outcome.LATE}
    files.go.set()


def test_a_fetch_ends_by_the_callers_own_deadline(faulty):
    store, files = faulty
    put(store, 1)
    files.blocked.add("read")
    started = time.perf_counter()
    ticket = store.fetch([name(1)], [bytearray(SLOT)], deadline_s=0.02)
    assert ticket.wait(5)
    assert time.perf_counter() - started < 0.25
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
    assert time.perf_counter() - started < 1
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
        from tests.test_nvme_store import SLOT, config, get, put
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


# Cancelling.


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


def test_more_waiting_stores_than_allowed_are_busy(tmp_path):
    opened = []

    def open_files(*args, **kwargs):
        opened.append(FaultyFiles(*args, **kwargs))
        return opened[-1]

    with NvmeStore(config(tmp_path, store_limit=3, write_threads=1), open_files=open_files) as store:
        opened[0].blocked.add("write")
        tickets = [store.store(name(0), b"")]
        assert opened[0].entered.acquire(timeout=5)
        tickets += [store.store(name(number), b"") for number in range(1, 6)]
        opened[0].go.set()
        assert all(ticket.wait(5) for ticket in tickets)
        outcomes = [ticket.outcomes[0] for ticket in tickets]
        assert outcomes == [Outcome.DONE] * 4 + [Outcome.BUSY] * 2


def test_a_callback_that_fails_harms_nobody(tmp_path):
    def fail(_: Ticket) -> None:
        raise RuntimeError("mine")

    with NvmeStore(config(tmp_path)) as store:
        assert store.store(name(1), b"1", done=fail).wait(5)
        assert store.fetch([name(1)], [bytearray(1)], done=fail).wait(5)
        assert get(store, 2, 0) is Outcome.MISSING
        assert put(store, 3) is Outcome.DONE


def test_a_closed_store_says_so(tmp_path):
    store = NvmeStore(config(tmp_path))
    put(store, 1)
    store.close()
    store.close()
    assert put(store, 2) is Outcome.CLOSED
    assert get(store, 1) is Outcome.CLOSED


def test_threads_that_store_fetch_delete_and_cancel_at_random_leave_the_books_balanced(tmp_path):
    capacity = 40 * (SLOT + HEADER_BYTES) + 2 * PAGE
    errors: list[BaseException] = []

    def play(store: NvmeStore, seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(300):
                number = int(rng.integers(60))
                size = SIZES[number % len(SIZES)]
                match int(rng.integers(4)):
                    case 0 | 1:
                        ticket = store.store(name(number), payload(number, size))
                        if rng.random() < 0.1:
                            ticket.cancel()
                        assert ticket.wait(10)
                    case 2:
                        get(store, number, size)
                    case _:
                        store.delete(name(number))
        except BaseException as error:
            errors.append(error)

    with NvmeStore(config(tmp_path, capacity_bytes=capacity)) as store:
        threads = [threading.Thread(target=play, args=(store, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            store.check_integrity()
            time.sleep(0.01)
        assert not errors
        assert store.statistics().fetches[Outcome.DONE] > 50
        assert not store.statistics().troubles
        for record in store.records():
            store.delete(record.name)
        assert store.statistics().used_bytes == 0
        store.check_integrity()


# Samples of `scripts/torture_nvme.py`, which runs for long what these run for seconds.


MEMORY = Path("/dev/shm")
"""Where each round closes a store, and a disk would take its time for that."""


def torture(directory: Path, command: str, rounds: int) -> dict[str, Any]:
    """In a process of its own: it forks."""
    program = [sys.executable, "-m", "scripts.torture_nvme", "--directory", str(directory), command]
    done = subprocess.run([*program, "--rounds", str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result


def test_a_killed_writer_leaves_every_acknowledged_record_and_no_wrong_byte(tmp_path):
    result = torture(tmp_path, "kill", 20)
    assert result["rounds"] == 20
    assert result["acknowledged"] > 50
    assert result["read_back"] > 100
    assert result["wrong"] == result["unopened"] == result["lost"] == result["corrupt"] == 0


def test_power_lost_at_any_byte_leaves_right_records_or_none(tmp_path):
    result = torture(MEMORY if MEMORY.is_dir() else tmp_path, "crash", 200)
    assert result["rounds"] == 200
    assert result["served"] > 1000
    assert result["found"] > result["served"], "some crash has to leave a header without its payload"
    assert result["wrong"] == result["unopened"] == 0


def test_damaged_files_are_misses_of_the_damaged_records_alone(tmp_path):
    result = torture(MEMORY if MEMORY.is_dir() else tmp_path, "damage", 300)
    assert sum(result["rounds"].values()) == 300
    assert result["refused"] > 100
    assert result["wrong"] == result["unopened"] == result["collateral"] == 0


# Books and headers.


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), max_size=80))
def test_free_space_gives_what_it_has_once_and_heals(steps):
    space = FreeSpace([Run(0, 50)])
    held: list[tuple[Run, ...]] = []
    for slots, choice in steps:
        if choice % 3 and held:
            space.release(held.pop(choice % len(held)))
        runs = space.take(slots)
        if runs is None:
            assert space.slots < slots
        else:
            assert sum(run.length for run in runs) == slots
            held.append(runs)
        everything = sorted([*space.runs, *(run for runs in held for run in runs)])
        assert [run.start for run in everything] == [0, *(run.stop for run in everything[:-1])]
        assert everything[-1].stop == 50
        assert all(one.stop < two.start for one, two in zip(space.runs, space.runs[1:], strict=False))
    for runs in held:
        space.release(runs)
    assert space.runs == [Run(0, 50)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["store", "commit", "use", "let go", "drop", "bad", "delete"]), st.integers(0, 20)),
        max_size=120,
    )
)
def test_the_books_balance_after_any_order_of_events(events):
    index = Index(30, SLOT)
    arriving: list[Record] = []
    used: list[Record] = []
    for event, number in events:
        match event:
            case "store":
                record = index.reserve(name(number), number * 1000)
                if isinstance(record, Record):
                    arriving.append(record)
                else:
                    assert record in (Outcome.HELD, Outcome.FULL)
            case "commit" if arriving:
                record = arriving.pop(number % len(arriving))
                index.commit(record)
                index.let_go(record)
            case "use":
                found = index.use(name(number), number * 1000)
                assert (found is not None) == (name(number) in index)
                if found is not None:
                    used.append(found)
            case "let go" if used:
                index.let_go(used.pop(number % len(used)))
            case "drop" | "bad" if used:
                index.drop(used[number % len(used)], bad=event == "bad")
            case "delete":
                index.delete(name(number))
        index.check_integrity()
    for record in arriving + used:
        index.drop(record)
        index.let_go(record)
    index.clear()
    index.check_integrity()
    assert (index.used_slots > 0) <= any(event == "bad" for event, _ in events)


MARK = fingerprint_of(b"x", slot_bytes=SLOT)


def written(records: list[Record], slots: int) -> bytearray:
    headers = bytearray(slots * HEADER_BYTES)
    for record in records:
        for run, packed in zip(record.runs, record.headers(MARK), strict=True):
            slot = run.start
            headers[slot * HEADER_BYTES : slot * HEADER_BYTES + len(packed)] = packed
    return headers


RECORDS = [
    Record(name(1), 3 * SLOT, 10, b"c" * 16, (Run(2, 1), Run(5, 2))),
    Record(name(2, 32), 0, 11, b"d" * 16, (Run(0, 1),)),
    Record(name(3), 2 * SLOT - 1, 9, b"e" * 16, (Run(7, 2),)),
]


def found(headers: bytes) -> list[Record]:
    half = len(headers) // HEADER_BYTES // 2 * HEADER_BYTES
    chunks = [bytes(headers[:half]), bytes(headers[half:])]
    return scan(chunks, fingerprint=MARK, slot_bytes=SLOT, max_payload_bytes=MAX).records


def test_headers_give_the_records_back_oldest_first():
    fields = [[getattr(record, field) for field in Record.__slots__] for record in found(written(RECORDS, 10))]
    expected = sorted(RECORDS, key=lambda record: record.sequence)
    assert fields == [[getattr(record, field) for field in Record.__slots__] for record in expected]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_costs_its_record_and_no_other(data):
    headers = written(RECORDS, 10)
    slot = data.draw(st.integers(0, 9))
    bit = data.draw(st.integers(0, HEADER_BYTES * 8 - 1))
    headers[slot * HEADER_BYTES + bit // 8] ^= 1 << bit % 8
    expected = {record.name for record in RECORDS if not any(run.start <= slot < run.stop for run in record.runs)}
    assert {record.name for record in found(headers)} == expected


@settings(deadline=None)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(0, 9), st.integers(0, 9))
def test_garbage_and_headers_in_other_places_are_no_records(garbage, source, target):
    headers = written(RECORDS, 10)
    moved = bytes(headers[source * HEADER_BYTES : (source + 1) * HEADER_BYTES])
    for replacement in (garbage, moved):
        headers[target * HEADER_BYTES : (target + 1) * HEADER_BYTES] = replacement
        names = {record.name for record in RECORDS if not any(run.start <= target < run.stop for run in record.runs)}
        if source != target:
            assert {record.name for record in found(headers)} == names


def test_of_two_records_of_one_name_the_later_holds():
    later = Record(name(1), SLOT, 20, b"z" * 16, (Run(9, 1),))
    (record,) = [record for record in found(written([*RECORDS, later], 10)) if record.name == name(1)]
    assert record.sequence == 20
