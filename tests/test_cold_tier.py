"""The cold tier: what comes up is what went down, or nothing; a restart finds it."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cold_tier_bench import (
    DTYPE,
    GLOBAL,
    LIMITS,
    LOCAL,
    SHAPES,
    SLOTS,
    Bench,
    content,
    name,
    same,
    slot_blocks,
    wait_for_measurement,
)
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.cold_tier import (
    ColdAccountingError,
    ColdTier,
    ColdTierLimits,
    store_config,
)
from wicore_backend.hmt.cold_tier.records import key_of, record_name
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome
from wicore_backend.hmt.policy.lru import LRU


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
        blocks = slot_blocks(GLOBAL, range(SLOTS))
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


def test_several_batches_are_decoded_at_once_into_scattered_slots(tmp_path, monkeypatch):
    limits = replace(LIMITS, tray_bytes=LIMITS.tray_bytes * 9 // 16)
    with Bench(tmp_path, "q8", limits=limits) as bench:
        bench.spill_numbers(GLOBAL, range(16))
        wait_for_measurement(bench)
        decode, together = bench.codecs[GLOBAL].decode, threading.Barrier(2, timeout=10)
        threads = set()

        def with_another(*args, **kwargs):
            threads.add(threading.current_thread().name)
            together.wait()
            decode(*args, **kwargs)

        monkeypatch.setattr(bench.codecs[GLOBAL], "decode", with_another)
        up = [SlotBlock(GLOBAL, name(number), (5 * number) % SLOTS) for number in range(16)]  # Two batches of eight.
        assert set(bench.restore(up)) == {Outcome.DONE}
        monkeypatch.undo()
        assert all(bench.right(block) for block in up)
        assert len(threads) == 2
        assert all("decode" in thread for thread in threads), "the thread that fetches has others to fetch for"


def test_a_batch_is_complete_once_it_has_what_a_tray_is_for_however_much_room_the_tray_has(tmp_path, monkeypatch):
    with Bench(tmp_path, limits=replace(LIMITS, tray_bytes=3000)) as bench:
        bench.spill_numbers(LOCAL, range(3))
        bench.spill_numbers(GLOBAL, range(7))
        wait_for_measurement(bench)
        sizes, fetch = [], bench.store.fetch

        def noted(names, *args, **kwargs):
            sizes.append(len(names))
            return fetch(names, *args, **kwargs)

        monkeypatch.setattr(bench.store, "fetch", noted)
        blocks = [*slot_blocks(LOCAL, range(3)), *slot_blocks(GLOBAL, range(7))]
        assert set(bench.restore(blocks)) == {Outcome.DONE}
        assert sizes == [1, 1, 1, 2, 2, 2, 1]


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


# Restarts.


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
