"""The NVMe store's books and headers: no slot in two states, and no record out of a damaged header."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nvme_kit import MAX, SLOT, name
from wicore_backend.hmt.nvme import (
    Outcome,
)
from wicore_backend.hmt.nvme.index import Index
from wicore_backend.hmt.nvme.record import HEADER_BYTES, Record, fingerprint_of, scan
from wicore_backend.hmt.nvme.space import FreeSpace, Run


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


# Headers.


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
