"""The cold tier: what comes up is what went down, or nothing; slots belong to one side; trouble is a miss."""

import errno
import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_nvme_store import FaultyFiles
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import Codec, make_codec
from wicore_backend.hmt.cold_tier import (
    ColdAccountingError,
    ColdTier,
    ColdTierLimits,
    Finished,
    Restore,
    store_config,
    workers,
)
from wicore_backend.hmt.cold_tier.pace import Pace
from wicore_backend.hmt.cold_tier.records import key_of, record_name
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome, StoreFiles
from wicore_backend.hmt.policy import POLICIES, Access
from wicore_backend.hmt.policy.a2cr import A2CR
from wicore_backend.hmt.policy.lru import LRU

GLOBAL, LOCAL = LayerGroup.GLOBAL, LayerGroup.LOCAL
SHAPES = {GLOBAL: (2, 2, 8, 2, 16), LOCAL: (5, 2, 8, 2, 16)}
DTYPE = torch.bfloat16
SLOTS = 24
LIMITS = ColdTierLimits(tray_bytes=1 << 14, trays=3, measure_s=3600.0)


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(group: LayerGroup, number: int) -> torch.Tensor:
    """What the block of that name holds: bfloat16 of the group's shape."""
    rng = np.random.default_rng([number, group is LOCAL])
    return torch.from_numpy(rng.standard_normal(SHAPES[group], np.float32)).to(DTYPE)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), two.contiguous().view(torch.int16))


class Bench:
    """A tier with its store and its slots, and what a loop thread does with them."""

    def __init__(
        self, directory: Path, codec="exact", *, capacity_bytes=4 << 20, policy=LRU, limits=LIMITS,
        open_files=StoreFiles, fingerprint=b"model", read_deadline_s=5.0, write_deadline_s=5.0,
    ) -> None:  # fmt: skip
        self.codecs: dict[LayerGroup, Codec] = {g: make_codec(codec, shape, DTYPE) for g, shape in SHAPES.items()}
        self.slots = {g: torch.zeros(SLOTS, *shape, dtype=DTYPE) for g, shape in SHAPES.items()}
        self.files: list[StoreFiles] = []

        def opened(*args, **kwargs):
            self.files.append(open_files(*args, **kwargs))
            return self.files[0]

        self.store = NvmeStore(
            store_config(
                directory,
                capacity_bytes=capacity_bytes,
                codecs=self.codecs,
                fingerprint=fingerprint,
                read_deadline_s=read_deadline_s,
                write_deadline_s=write_deadline_s,
            ),
            open_files=opened,
        )
        self.news = threading.Event()
        self.tier = ColdTier(
            self.store, self.codecs, self.slots, policy=policy, woken=self.news.set, limits=limits
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files:
            if isinstance(file, FaultyFiles):
                file.errors.clear()
                file.blocked.clear()
                file.go.set()
        self.tier.close()
        self.tier.finished()
        assert not self.tier.busy
        self.tier.check_integrity()
        self.store.close()

    def put(self, group: LayerGroup, number: int, slot: int) -> SlotBlock:
        """Fill a slot with the block's content."""
        self.slots[group][slot] = content(group, number)
        return SlotBlock(group, name(number), slot)

    def wait(self, count: int, timeout_s: float = 10.0) -> list[Finished]:
        """The next `count` reports."""
        end = time.monotonic() + timeout_s
        ended = self.tier.finished()
        while len(ended) < count:
            assert self.news.wait(end - time.monotonic()), f"{len(ended)} of {count} reports came"
            self.news.clear()
            ended += self.tier.finished()
        assert len(ended) == count
        return ended

    def spill(self, blocks: list[SlotBlock]) -> list[Outcome]:
        """Outcomes in the order of `blocks`."""
        assert self.tier.spill(blocks) == len(blocks)
        ended = {done.block: done.outcome for done in self.wait(len(blocks))}
        return [ended[block] for block in blocks]

    def spill_numbers(self, group: LayerGroup, numbers, *, at_once=SLOTS) -> list[Outcome]:
        """The same for any number of blocks, a few at a time."""
        numbers = list(numbers)
        outcomes: list[Outcome] = []
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            outcomes += self.spill([self.put(group, number, slot) for slot, number in enumerate(part)])
        return outcomes

    def restore(self, blocks: list[SlotBlock], deadline_s=None) -> list[Outcome]:
        """Outcomes in the order of `blocks`, after a look at each slot that should hold something."""
        restore = self.tier.restore(blocks, deadline_s)
        ended = {done.block: done.outcome for done in self.wait(len(blocks))}
        assert restore.done
        return [ended[block] for block in blocks]

    def expected(self, group: LayerGroup, number: int) -> torch.Tensor:
        """What the codec makes of the block."""
        block = content(group, number)[None]
        out = torch.empty_like(block)
        self.codecs[group].decode(self.codecs[group].encode(block), out=out)
        return out[0]

    def right(self, block: SlotBlock) -> bool:
        number = int.from_bytes(block.name, "little")
        return same(self.slots[block.group][block.slot], self.expected(block.group, number))


# Down and up.


@pytest.mark.parametrize("codec", ["exact", "fp8", "q8", "q4"])
def test_blocks_come_up_as_their_codec_makes_them_in_other_slots_and_another_order(tmp_path, codec):
    with Bench(tmp_path, codec) as bench:
        down = [bench.put(group, slot, slot) for slot in range(SLOTS) for group in SHAPES]
        assert set(bench.spill(down)) == {Outcome.DONE}
        for slots in bench.slots.values():
            slots.fill_(7)
        order = np.random.default_rng(0).permutation(SLOTS).tolist()
        up = [SlotBlock(group, name(number), slot) for slot, number in enumerate(order) for group in SHAPES]
        assert set(bench.restore(up)) == {Outcome.DONE}
        assert all(bench.right(block) for block in up)
        if codec == "exact":
            assert all(same(bench.slots[b.group][b.slot], content(b.group, order[b.slot])) for b in up)
        bench.tier.check_integrity()


def test_exact_blocks_keep_every_bit_pattern(tmp_path):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPE)
    with Bench(tmp_path) as bench:
        values = bench.slots[GLOBAL].numel()
        bench.slots[GLOBAL].view(-1)[:] = patterns.repeat(-(-values // len(patterns)))[:values]
        before = bench.slots[GLOBAL].clone()
        blocks = [SlotBlock(GLOBAL, name(slot), slot) for slot in range(SLOTS)]
        bench.spill(blocks)
        bench.slots[GLOBAL].zero_()
        assert set(bench.restore(blocks)) == {Outcome.DONE}
        assert same(bench.slots[GLOBAL], before)


def test_q8_blocks_are_within_the_codecs_bound(tmp_path):
    with Bench(tmp_path, "q8") as bench:
        bench.spill([bench.put(LOCAL, 1, 0)])
        assert bench.restore([SlotBlock(LOCAL, name(1), 3)]) == [Outcome.DONE]
        wanted = content(LOCAL, 1).float()
        largest = wanted.view(-1, 64).abs().amax(1, keepdim=True)
        error = (bench.slots[LOCAL][3].float() - wanted).view(-1, 64).abs()
        assert (error <= largest / 254 + largest * 2**-8).all()
        assert (error > 0).any()


def test_the_same_name_in_two_groups_is_two_blocks(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill([bench.put(GLOBAL, 1, 0)])
        assert bench.tier.holds(GLOBAL, name(1))
        assert not bench.tier.holds(LOCAL, name(1))
        assert bench.restore([SlotBlock(LOCAL, name(1), 0)]) == [Outcome.MISSING]
        bench.spill([bench.put(LOCAL, 1, 0)])
        up = [SlotBlock(GLOBAL, name(1), 5), SlotBlock(LOCAL, name(1), 6)]
        assert bench.restore(up) == [Outcome.DONE] * 2
        assert all(bench.right(block) for block in up)


def test_a_block_that_is_held_or_on_its_way_is_not_stored_twice(tmp_path):
    with Bench(tmp_path) as bench:
        one = [bench.put(GLOBAL, 1, 0), bench.put(GLOBAL, 1, 1)]
        assert sorted(bench.spill(one)) == [Outcome.DONE, Outcome.HELD]
        called = []
        assert bench.tier.spill([bench.put(GLOBAL, 1, 2)], lambda: called.append(1)) == 1
        assert bench.news.is_set()
        assert [done.outcome for done in bench.tier.finished()] == [Outcome.HELD]
        assert not called
        assert bench.store.statistics().stores == {Outcome.DONE: 1}
        assert bench.tier.statistics().groups[GLOBAL].refused == 0


def test_a_spill_waits_for_what_comes_before_it_and_a_restore_does_not(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill([bench.put(GLOBAL, 1, 0)])
        ready = threading.Event()
        copied = threading.Event()

        def copy_into_the_slot():
            assert ready.wait(10)
            bench.put(GLOBAL, 2, 1)
            copied.set()

        bench.tier.spill([SlotBlock(GLOBAL, name(2), 1)], copy_into_the_slot)
        bench.tier.spill([bench.put(GLOBAL, 3, 2)])
        assert bench.restore([SlotBlock(GLOBAL, name(1), 3)]) == [Outcome.DONE]
        assert not copied.is_set()
        assert not bench.tier.holds(GLOBAL, name(2))
        ready.set()
        assert {done.outcome for done in bench.wait(2)} == {Outcome.DONE}
        assert bench.restore([SlotBlock(GLOBAL, name(2), 4)]) == [Outcome.DONE]
        assert bench.right(SlotBlock(GLOBAL, name(2), 4))


def test_a_spill_whose_bytes_do_not_arrive_has_failed(tmp_path):
    def fail():
        raise RuntimeError("the copy failed")

    with Bench(tmp_path) as bench:
        bench.tier.spill([bench.put(GLOBAL, 1, 0)], fail)
        assert [done.outcome for done in bench.wait(1)] == [Outcome.FAILED]
        assert not bench.tier.holds(GLOBAL, name(1))
        assert bench.spill([bench.put(GLOBAL, 1, 0)]) == [Outcome.DONE]


def test_where_slots_are_records_nothing_is_encoded_on_the_way(tmp_path, monkeypatch):
    with Bench(tmp_path) as bench:

        def fail(*_, **__):
            raise RuntimeError("a copy of every byte, on one thread")

        for codec in bench.codecs.values():
            for work in ("encode", "decode"):
                monkeypatch.setattr(codec, work, fail)
        down = [bench.put(group, number, 2 * number) for group in (GLOBAL, LOCAL) for number in range(9)]
        assert set(bench.spill(down)) == {Outcome.DONE}
        up = [block._replace(slot=SLOTS - 1 - block.slot) for block in down]
        assert set(bench.restore(up)) == {Outcome.DONE}
        monkeypatch.undo()
        assert all(bench.right(block) for block in up)


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


# Bugs.


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
            monkeypatch.setattr(workers, "record_name", fail)
        elif step == "store":
            monkeypatch.setattr(bench.store, "store_all" if where == "spill" else "fetch", fail)
        elif step == "landing":
            monkeypatch.setattr(workers.SpillWorker, "_measure", fail)
            monkeypatch.setattr(workers.RestoreWorker, "_teaches", fail)
        else:
            method = "stored" if where == "spill" else "unpin"
            noted = getattr(bench.tier._books, method)
            monkeypatch.setattr(bench.tier._books, method, lambda *what: fail(noted(*what)))
        if where == "spill":
            bench.tier.spill([bench.put(GLOBAL, number, number) for number in range(10, 16)])
        else:
            bench.tier.restore([SlotBlock(GLOBAL, name(number), number) for number in range(6)])
        reports = bench.wait(6)
        assert len({report.block for report in reports}) == 6
        assert step == "landing" or {report.outcome for report in reports} == {Outcome.FAILED}
        monkeypatch.undo()
        assert bench.spill([bench.put(LOCAL, 1, 0)]) == [Outcome.DONE]
        assert bench.restore([SlotBlock(LOCAL, name(1), 5)]) == [Outcome.DONE]


def test_a_long_prompt_holds_the_books_lock_a_part_at_a_time(tmp_path):
    keys = [(group, name(number)) for number in range(4096) for group in (GLOBAL, LOCAL)]
    policy = A2CR(100)
    with Bench(tmp_path, policy=lambda _: policy) as bench:
        bench.tier.close()  # So that nobody else listens.
        bench.tier.observe(Access(keys=keys))
        assert policy.explain(keys[0]) is None, "not on the caller's thread"
        parts = 0
        while bench.tier._books.listen():
            parts += 1
        assert parts > 16
        assert policy.explain(keys[-1]) is not None


def test_the_policy_hears_of_prompts_on_the_tiers_thread(tmp_path):
    policy = A2CR(100)
    with Bench(tmp_path, policy=lambda _: policy) as bench:
        bench.tier.observe(Access(keys=[(GLOBAL, name(1))]))
        bench.tier.attend([(GLOBAL, name(1))], [1.0])
        end = time.monotonic() + 10
        while policy.explain((GLOBAL, name(1))) is None and time.monotonic() < end:
            time.sleep(0.001)
        assert policy.explain((GLOBAL, name(1))) is not None


# Mistakes of the caller.


@pytest.mark.parametrize("call", ["spill", "restore"])
def test_a_slot_with_a_block_under_way_is_refused_until_it_is_reported(tmp_path, call):
    with Bench(tmp_path) as bench:
        block = bench.put(GLOBAL, 1, 0)
        getattr(bench.tier, call)([block])
        for again in (bench.tier.spill, bench.tier.restore):
            with pytest.raises(ValueError, match="global slot 0 has a block under way"):
                again([SlotBlock(GLOBAL, name(2), 1), SlotBlock(GLOBAL, name(3), 0)])
        bench.wait(1)
        assert bench.spill([SlotBlock(GLOBAL, name(2), 1), SlotBlock(GLOBAL, name(3), 0)]) == [Outcome.DONE] * 2


def test_slots_and_names_that_cannot_be_are_errors_at_once_with_nothing_taken(tmp_path):
    with Bench(tmp_path) as bench:
        good = bench.put(GLOBAL, 1, 0)
        for bad, message in [
            (SlotBlock(GLOBAL, name(2), SLOTS), f"slot {SLOTS}: there are {SLOTS}"),
            (SlotBlock(GLOBAL, name(2), -1), "slot -1"),
            (SlotBlock(GLOBAL, b"short", 1), "a block's name of 5 bytes"),
            (SlotBlock(GLOBAL, name(2), 0), "under way"),
        ]:
            for call in (bench.tier.spill, bench.tier.restore):
                with pytest.raises(ValueError, match=message):
                    call([good, bad])
        assert not bench.tier.busy


def test_shapes_that_do_not_fit_are_named(tmp_path):
    with Bench(tmp_path) as bench:
        for slots, message in [
            ({g: t[:, :1] for g, t in bench.slots.items()}, "exact takes"),
            ({g: t.float() for g, t in bench.slots.items()}, "float32"),
            ({GLOBAL: bench.slots[GLOBAL]}, "slots for"),
        ]:
            with pytest.raises(InvalidArgumentError, match=message):
                ColdTier(bench.store, bench.codecs, slots, policy=LRU, woken=lambda: None)
        with pytest.raises(InvalidArgumentError, match="trays is 0"):
            ColdTierLimits(trays=0)
    larger = {GLOBAL: make_codec("exact", (9, 2, 8, 2, 16), DTYPE)}
    slots = {GLOBAL: torch.zeros(1, 9, 2, 8, 2, 16, dtype=DTYPE)}
    with pytest.raises(InvalidArgumentError, match="does not fit the store's max_payload_bytes"):
        ColdTier(bench.store, larger, slots, policy=LRU, woken=lambda: None)


def test_the_store_wastes_little_and_knows_its_codecs():
    def config(codec, shapes):
        codecs = {group: make_codec(codec, shape, DTYPE) for group, shape in shapes.items()}
        return store_config(Path("/x"), capacity_bytes=1 << 34, codecs=codecs, fingerprint=b"model"), codecs

    gemma_27b = {GLOBAL: (10, 2, 32, 16, 128), LOCAL: (52, 2, 32, 16, 128)}
    found, codecs = config("q8", gemma_27b)
    for codec in codecs.values():
        pieces = -(-codec.encoded_bytes // found.slot_bytes)
        assert pieces * (found.slot_bytes + 128) / codec.encoded_bytes < 1.001
    prints = [config(codec, shapes)[0].fingerprint for codec in ("exact", "q8") for shapes in (SHAPES, gemma_27b)]
    assert len(set(prints)) == 4
    assert key_of(record_name((LOCAL, name(5)))) == (LOCAL, name(5))
    assert key_of(bytes(32)) is None
    assert key_of(bytes(16)) is None


# Restarts.


def test_a_restart_finds_everything_and_another_fingerprint_nothing(tmp_path):
    with Bench(tmp_path, "q8") as bench:
        for group in SHAPES:
            assert set(bench.spill_numbers(group, range(10))) == {Outcome.DONE}
    with Bench(tmp_path, "q8") as bench:
        blocks = [SlotBlock(group, name(number), number) for group in SHAPES for number in range(10)]
        assert all(bench.tier.holds(block.group, block.name) for block in blocks)
        assert bench.tier.statistics().held == {GLOBAL: 10, LOCAL: 10}
        assert set(bench.restore(blocks)) == {Outcome.DONE}
        assert all(bench.right(block) for block in blocks)
        bench.tier.check_integrity()
    with Bench(tmp_path, "q8", fingerprint=b"another model") as bench:
        assert not any(bench.tier.holds(block.group, block.name) for block in blocks)
        assert set(bench.restore(blocks)) == {Outcome.MISSING}


def test_another_codec_finds_nothing(tmp_path):
    with Bench(tmp_path, "q8") as bench:
        bench.spill_numbers(GLOBAL, range(5))
    with Bench(tmp_path, "fp8") as bench:
        assert bench.tier.statistics().held == {GLOBAL: 0, LOCAL: 0}


def test_records_that_are_no_blocks_are_deleted_at_the_opening(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(GLOBAL, range(2))
        assert bench.store.store(bytes(32), b"another's").wait(5)
        assert bench.store.store(record_name((GLOBAL, name(9))), b"too short").wait(5)
        with pytest.raises(ColdAccountingError, match="do not know"):
            bench.tier.check_integrity()
        bench.tier.close()
        bench.tier = ColdTier(bench.store, bench.codecs, bench.slots, policy=LRU, woken=bench.news.set, limits=LIMITS)
        assert bench.tier.statistics().held == {GLOBAL: 2, LOCAL: 0}
        bench.tier.check_integrity()


def test_after_a_restart_the_oldest_records_leave_first(tmp_path):
    with Bench(tmp_path, capacity_bytes=200_000) as bench:
        stored = bench.spill_numbers(GLOBAL, range(100), at_once=4).count(Outcome.DONE)
        held = [number for number in range(100) if bench.tier.holds(GLOBAL, name(number))]
        assert stored == 100
        assert held == list(range(100 - len(held), 100))
    with Bench(tmp_path, capacity_bytes=200_000) as bench:
        assert [number for number in range(100) if bench.tier.holds(GLOBAL, name(number))] == held
        wait_for_measurement(bench)  # A victim that is being measured with leaves room later only.
        bench.spill_numbers(GLOBAL, range(100, 103))
        left = [number for number in range(103) if bench.tier.holds(GLOBAL, name(number))]
        assert left == [*held[3:], 100, 101, 102]


# Room.


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "a2cr"])
def test_a_full_store_gives_up_what_its_policy_says_and_groups_share_the_room(tmp_path, policy):
    with Bench(tmp_path, capacity_bytes=300_000, policy=POLICIES[policy]) as bench:
        for group in SHAPES:
            bench.tier.observe(Access(keys=[(group, name(number)) for number in range(60)]))
            assert Outcome.DONE in bench.spill_numbers(group, range(60))
        statistics = bench.tier.statistics()
        evicted = sum(counts.evicted for counts in statistics.groups.values())
        done = sum(counts.spills[Outcome.DONE] for counts in statistics.groups.values())
        refused = sum(counts.spills[Outcome.REFUSED] for counts in statistics.groups.values())
        assert (refused if policy == "a2cr" else evicted) > 20  # All being alike, A2CR has no reason for an exchange.
        assert done - evicted == sum(statistics.held.values()) == len(bench.store.records())
        assert bench.store.statistics().used_bytes <= 300_000
        bench.tier.check_integrity()
        for group in SHAPES:
            held = [number for number in range(60) if bench.tier.holds(group, name(number))]
            assert set(bench.restore([SlotBlock(group, name(n), s) for s, n in enumerate(held[:SLOTS])])) <= {
                Outcome.DONE
            }


def test_what_was_restored_lately_stays_longer(tmp_path):
    with Bench(tmp_path, capacity_bytes=200_000) as bench:
        assert set(bench.spill_numbers(GLOBAL, range(100), at_once=4)) == {Outcome.DONE}
        oldest = next(number for number in range(100) if bench.tier.holds(GLOBAL, name(number)))
        assert bench.restore([SlotBlock(GLOBAL, name(oldest), 0)]) == [Outcome.DONE]
        bench.spill_numbers(GLOBAL, range(100, 110))
        assert bench.tier.holds(GLOBAL, name(oldest))
        assert not bench.tier.holds(GLOBAL, name(oldest + 1))


def test_a_policy_can_refuse_a_block_when_the_store_is_full(tmp_path):
    class Closed(LRU):
        def admit(self, _key):
            return False

    with Bench(tmp_path, capacity_bytes=200_000, policy=Closed) as bench:
        outcomes = Counter(bench.spill_numbers(GLOBAL, range(100)))
        assert outcomes[Outcome.DONE] == bench.tier.statistics().held[GLOBAL] > 10
        assert outcomes[Outcome.REFUSED] == 100 - outcomes[Outcome.DONE]
        assert bench.tier.statistics().groups[GLOBAL].evicted == 0
        assert bench.tier.statistics().groups[GLOBAL].refused == outcomes[Outcome.REFUSED]


def test_records_that_are_being_restored_do_not_leave_and_a_store_full_of_them_says_so(tmp_path):
    with Bench(tmp_path, capacity_bytes=60_000, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(4))
        wait_for_measurement(bench)
        bench.spill_numbers(GLOBAL, range(4, 20), at_once=4)
        held = [number for number in range(20) if bench.tier.holds(GLOBAL, name(number))]
        assert 0 < len(held) < 20
        (files,) = bench.files
        files.blocked.add("read")
        up = [SlotBlock(GLOBAL, name(number), slot) for slot, number in enumerate(held)]
        restore = bench.tier.restore(up)
        assert bench.tier.spill([bench.put(GLOBAL, 100, SLOTS - 1)]) == 1
        (ended,) = bench.wait(1)
        assert ended.outcome is Outcome.FULL
        assert all(bench.tier.holds(GLOBAL, name(number)) for number in held)
        bench.tier.check_integrity()
        files.go.set()
        assert {done.outcome for done in bench.wait(len(up))} == {Outcome.DONE}
        assert restore.done
        assert all(bench.right(block) for block in up)
        files.blocked.clear()
        assert bench.spill([bench.put(GLOBAL, 100, SLOTS - 1)]) == [Outcome.DONE]


def test_a_slow_disk_makes_spills_fewer_and_never_waits(tmp_path):
    limits = ColdTierLimits(tray_bytes=1 << 14, trays=3, backlog_bytes=5 * 2048, measure_s=3600.0)
    with Bench(tmp_path, limits=limits, open_files=FaultyFiles) as bench:
        (files,) = bench.files
        files.blocked.add("write")
        blocks = [bench.put(GLOBAL, slot, slot) for slot in range(SLOTS)]
        started = time.perf_counter()
        assert bench.tier.spill(blocks) == 5
        assert bench.tier.spill(blocks[5:]) == 0
        assert time.perf_counter() - started < 0.5
        assert bench.tier.statistics().groups[GLOBAL].unasked == 19 + 19
        assert bench.tier.statistics().spilling_bytes == 5 * 2048
        files.go.set()
        bench.wait(5)
        assert bench.tier.spill(blocks[5:]) == 5
        bench.wait(5)
        large = bench.put(LOCAL, 1, 0)
        assert bench.spill([large]) == [Outcome.DONE]


# Trouble.


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
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(6)]
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


def wait_for_measurement(bench: Bench) -> None:
    end = time.monotonic() + 5
    while bench.tier.restore_seconds(1) is None:
        assert time.monotonic() < end
        time.sleep(0.001)


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
        assert set(bench.restore([SlotBlock(GLOBAL, name(n), n) for n in range(3)])) == {Outcome.DONE}
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        bench.tier.check_integrity()


def test_a_disk_that_gives_nothing_is_misses(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(10))
        (files,) = bench.files
        files.errors["read"] = errno.EIO
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(10)]
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
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(4)]
        assert set(bench.restore(up)) == {Outcome.MISSING}
        assert bench.spill([bench.put(GLOBAL, 7, 7)]) == [Outcome.REFUSED]
        assert bench.tier.statistics().groups[GLOBAL].restores == {Outcome.MISSING: 4}
        bench.tier.check_integrity()


def test_a_silent_disk_is_late_and_its_slots_come_back_untouched(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
        wait_for_measurement(bench)
        (files,) = bench.files
        files.blocked.add("read")
        bench.slots[GLOBAL].fill_(3)
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(SLOTS)]
        started = time.perf_counter()
        first = bench.tier.restore(up[:20], 0.5)
        second = bench.tier.restore(up[20:], 0.1)  # Finds no tray, and waits for its own deadline alone.
        ended = bench.wait(4)
        assert 0.1 <= time.perf_counter() - started < 0.5
        assert second.done
        ended += bench.wait(20)
        assert 0.5 <= time.perf_counter() - started < 2
        assert first.done
        assert {done.outcome for done in ended} == {Outcome.LATE}
        files.blocked.clear()
        files.go.set()
        bench.spill([bench.put(LOCAL, 1, 1)])
        assert (bench.slots[GLOBAL] == 3).all()
        assert set(bench.restore(up)) == {Outcome.DONE}, "late records are still held"
        bench.tier.check_integrity()


def test_a_write_that_hangs_is_no_record_and_gives_its_slot_back(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles, write_deadline_s=0.1) as bench:
        (files,) = bench.files
        files.blocked.add("write")
        assert bench.spill([bench.put(GLOBAL, 1, 0)]) == [Outcome.LATE]
        assert not bench.tier.holds(GLOBAL, name(1))
        files.blocked.clear()
        files.go.set()
        assert bench.spill([bench.put(GLOBAL, 1, 0)]) == [Outcome.DONE]
        assert bench.restore([SlotBlock(GLOBAL, name(1), 2)]) == [Outcome.DONE]
        assert bench.right(SlotBlock(GLOBAL, name(1), 2))


# Cancelling.


def test_a_cancelled_restore_ends_without_the_disk_and_touches_its_slots_no_more(tmp_path):
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
        wait_for_measurement(bench)
        (files,) = bench.files
        files.blocked.add("read")
        bench.slots[GLOBAL].fill_(3)
        restore = bench.tier.restore([SlotBlock(GLOBAL, name(number), number) for number in range(SLOTS)])
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
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(SLOTS)]
        assert set(bench.restore(up)) == {Outcome.DONE}


def test_a_cancel_cuts_what_is_read_but_not_what_is_being_decoded(tmp_path, monkeypatch):
    with Bench(tmp_path, "q8", limits=replace(LIMITS, tray_bytes=LIMITS.tray_bytes * 9 // 16)) as bench:
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
        restore = bench.tier.restore([SlotBlock(GLOBAL, name(number), number) for number in range(16)])
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
    with Bench(tmp_path, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(SLOTS))
        wait_for_measurement(bench)
        (files,) = bench.files
        files.blocked.add("read")
        up = [SlotBlock(GLOBAL, name(number), number) for number in range(SLOTS)]
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


# Pace.


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


def test_a_disk_that_was_slow_is_found_to_be_well_again(tmp_path):
    limits = ColdTierLimits(tray_bytes=1 << 14, trays=3, measure_s=0.02)
    with Bench(tmp_path, limits=limits, open_files=FaultyFiles, read_deadline_s=0.3) as bench:
        bench.spill_numbers(GLOBAL, range(8))
        wait_for_measurement(bench)
        well = bench.tier.restore_seconds(1 << 14)
        (files,) = bench.files
        files.blocked.add("read")
        assert set(bench.restore([SlotBlock(GLOBAL, name(number), number) for number in range(8)])) == {Outcome.LATE}
        slow = bench.tier.restore_seconds(1 << 14)
        assert well is not None
        assert slow is not None
        assert slow > 0.1
        assert set(bench.restore([SlotBlock(GLOBAL, name(number), number) for number in range(8)])) == {Outcome.LATE}
        assert bench.tier.restore_seconds(1 << 14) == slow, "a store that gives up at once is not fast"
        files.blocked.clear()
        files.go.set()
        end = time.monotonic() + 10
        while (bench.tier.restore_seconds(1 << 14) or 0) > slow / 5:
            assert time.monotonic() < end
            time.sleep(0.01)


# The end.


def test_closing_under_load_finishes_what_is_under_way_and_takes_no_more(tmp_path):
    with Bench(tmp_path) as bench:
        bench.spill_numbers(LOCAL, range(SLOTS))
        down = [bench.put(GLOBAL, slot, slot) for slot in range(SLOTS)]
        up = [SlotBlock(LOCAL, name(slot), slot) for slot in range(SLOTS)]
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
        bench.tier.restore([SlotBlock(LOCAL, name(slot), slot) for slot in range(SLOTS)])
        started = time.perf_counter()
        bench.tier.close(timeout_s=0.1)
        assert time.perf_counter() - started < 1
        outcomes = {done.outcome for done in bench.tier.finished()}
        assert outcomes <= {Outcome.CLOSED, Outcome.CANCELLED}
        assert not bench.tier.busy


def test_closing_does_not_wait_for_a_copy_that_never_ends(tmp_path, caplog):
    with Bench(tmp_path) as bench:
        never = threading.Event()
        bench.tier.spill([bench.put(GLOBAL, 1, 1)], lambda: never.wait(30) and None)
        started = time.perf_counter()
        bench.tier.close(timeout_s=0.1)
        assert time.perf_counter() - started < 3
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


# Together.


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
        directory, capacity_bytes=150_000, open_files=Moody, read_deadline_s=0.02, write_deadline_s=0.02
    ) as bench:
        bench.store.config.__dict__["retry_s"] = 0.001
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
