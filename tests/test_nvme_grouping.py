"""Records that are moved together: by how few calls of the disk, and how many at a time."""

import threading
from collections.abc import Sequence

import pytest

from tests.nvme_kit import SLOT, name, payload
from wicore_backend.hmt.nvme import Outcome, StoreFiles
from wicore_backend.hmt.nvme.files import aligned_buffer
from wicore_backend.hmt.nvme.lane import Job, Lane
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record
from wicore_backend.hmt.nvme.space import Run
from wicore_backend.hmt.nvme.transfer import read_records, write_headers, write_records

COUNT = 6
ORDERS = {"as_they_lie": range(COUNT), "the_last_first": range(COUNT)[::-1], "in_no_order": [3, 0, 5, 1, 4, 2]}


class CountedFiles(StoreFiles):
    """Files that note which runs are moved."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.runs: list[Run] = []

    def read(self, run, into):
        self.runs.append(run)
        super().read(run, into)

    def write(self, run, pieces):
        self.runs.append(run)
        super().write(run, pieces)


@pytest.fixture
def files(tmp_path):
    opened = CountedFiles(tmp_path, slots=2 * COUNT, slot_bytes=SLOT, preallocate=True)
    yield opened
    opened.close()


def neighbours(size: int) -> list[Record]:
    """Records of one slot, one beside the other."""
    return [Record(name(number), size, number, bytes(16), (Run(2 + number, 1),)) for number in range(COUNT)]


@pytest.mark.parametrize("size", [SLOT, SLOT - 5000, 100])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_neighbours_are_moved_by_few_calls_whatever_their_order(files, size, aligned, order):
    records = [neighbours(size)[number] for number in order]
    payloads = []
    for record in records:
        memory = memoryview(aligned_buffer(2 * SLOT))[0 if aligned else 64 :][:size]
        memory[:] = payload(record.sequence, size)
        payloads.append(memory)
    buffer = memoryview(aligned_buffer(COUNT * SLOT))
    write_records(files, records, payloads, buffer)
    assert len(files.runs) == (1 if size == SLOT else COUNT), "what fills its slots is one piece"
    files.runs.clear()
    buffer[:] = bytes(len(buffer))
    found = read_records(files, records, buffer)
    assert files.runs == [Run(2, COUNT)]
    assert [bytes(part) for part in found] == [payload(record.sequence, size) for record in records]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_headers_of_neighbours_lie_where_their_slots_do_whatever_their_order(files, order):
    records = neighbours(SLOT)
    write_headers(files, [records[number] for number in order], b"fingerprint 0123")
    headers = [b"".join(record.headers(b"fingerprint 0123")) for record in records]
    assert files.read_headers(2, COUNT) == b"".join(headers)
    assert files.read_headers(0, 2) == bytes(2 * HEADER_BYTES)


class Noted(Job):
    """A job that has nothing to do."""

    wanted_at_last = False
    outcome: Outcome | None = None

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        self.wanted_at_last = wanted
        return outcome

    def settle(self, outcome: Outcome) -> None:
        self.outcome = outcome


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        pytest.param([4] * 9, [3, 3, 3], id="until_they_are_enough"),
        pytest.param([30, 30], [1, 1], id="one_that_is_more_than_enough_goes_alone"),
        pytest.param([4, 30, 4, 4, 4], [1, 1, 3], id="what_does_not_fit_beside_others_waits"),
        pytest.param([9, 20, 9, 9], [2, 2], id="the_last_may_be_more"),
    ],
)
def test_a_thread_takes_jobs_until_they_are_enough(weights: Sequence[int], expected: Sequence[int]):
    entered, go = threading.Event(), threading.Event()
    groups: list[int] = []

    def work(jobs: Sequence[Noted], _: memoryview) -> list[Outcome]:
        entered.set()
        assert go.wait(10)
        groups.append(len(jobs))
        return [Outcome.DONE] * len(jobs)

    lane: Lane[Noted] = Lane("test", work, [memoryview(bytearray(32))], enough=10, work_deadline_s=10.0)
    assert lane.submit([Noted(weight=1)])
    assert entered.wait(10)
    jobs = [Noted(weight=weight) for weight in weights]
    assert lane.submit(jobs)
    go.set()
    assert lane.close(10.0)
    assert all(job.wanted_at_last and job.outcome is Outcome.DONE for job in jobs)
    assert groups == [1, *expected]
