"""The NVMe store: what is fetched is what was stored, or nothing, after a restart too; the bound holds."""

import errno
import fcntl
import os
import threading
import time

import numpy as np
import pytest

from tests.nvme_kit import MAX, SIZES, SLOT, FaultyFiles, config, get, name, payload, put, taken
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.nvme import (
    NvmeStore,
    Outcome,
    Ticket,
)
from wicore_backend.hmt.nvme import files as nvme_files
from wicore_backend.hmt.nvme.files import PAGE, aligned_buffer
from wicore_backend.hmt.nvme.record import HEADER_BYTES


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


LEAST = -(-MAX // SLOT) * (SLOT + HEADER_BYTES) + 2 * PAGE
MOST = (1 << 28) * (SLOT + HEADER_BYTES) + 2 * PAGE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_bytes": 1000}, "multiple of 4096"),
        ({"capacity_bytes": LEAST - 1}, f"nvme_cache_bytes is {LEAST - 1:,}, but .* from {LEAST:,}, which hold one"),
        ({"read_threads": 0}, "read_threads is 0"),
        ({"capacity_bytes": 1 << 60}, f"nvme_cache_bytes is {1 << 60:,}, but .* to {MOST:,}"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_the_remedy(tmp_path, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("capacity", [LEAST, MOST])
def test_the_least_and_the_most_that_a_refusal_names_are_taken(tmp_path, capacity):
    assert config(tmp_path, capacity_bytes=capacity).slots * SLOT >= MAX


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


# Callers, and many of them.


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
