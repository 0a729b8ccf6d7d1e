"""One block through the states that `wicore_backend/hmt/__init__.py` tells of, in real tiers; the books at each."""

import dataclasses
import re
import threading
import time

import pytest

from tests.test_block_mover import LAYOUT, World
from wicore_backend import hmt
from wicore_backend.hmt.block_pool import BlockPool
from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme.index import Index

G = LayerGroup.GLOBAL


class Life:
    """A world of three tiers, and one global block of a sequence in it."""

    def __init__(self, directory) -> None:
        self.world = World(directory, device=24, host=40)
        tier = self.world.cold.tier
        tier._limits = dataclasses.replace(tier._limits, behind_bytes_per_second=1e9)
        self.go = threading.Event()
        self.names, self.sequence = self.world.compute(0, 8)
        self.name = self.names.first(1)[0]

    def hold(self) -> None:
        """The cold tier's threads wait for this before they touch a slot: what is under way stays so."""
        assert self.go.wait(10)

    @property
    def where(self) -> tuple[str, str, str]:
        """The block's state on the device, in host memory and for the cold tier; proves the books."""
        self.world.books.check_integrity()
        self.world.cold.tier.check_integrity()
        pool, shelf = self.world.books.pools[G], self.world.lower.host._shelves[G]
        block = pool.find(self.name)
        device = "free" if block is None else "active" if pool.is_active(block) else "cached"
        host = next(
            (
                state
                for state in ("arriving", "leaving", "stored", "copied", "pins")
                if self.name in getattr(shelf, state)
            ),
            "held" if self.name in shelf.slots else "free",
        )
        books, key = self.world.cold.tier._books, (G, self.name)
        cold = "spilling" if key in books._spilling else "unknown"
        if key in books._held:
            cold = "pinned" if books._held[key] else "held"
        return device, "pinned" if host == "pins" else host, cold

    def fill_host_memory(self) -> None:
        """Have other blocks take all slots, and leave them again to nobody."""
        host = self.world.lower.host
        taken = [(group, b"%d" % n) for group in LAYOUT.groups for n in range(host.slots[group])]
        for group, name in taken:
            (_,) = host.reserve(group, [name])
        for group, name in taken:
            host.arrived(group, name, there=False)

    def end(self) -> None:
        """Let what is under way come to its end."""
        self.go.set()
        deadline = time.monotonic() + 10
        while self.world.cold.tier.busy:
            assert time.monotonic() < deadline
            self.world.lower.collect()
            time.sleep(0.001)
        self.go.clear()


@pytest.fixture
def life(tmp_path):
    life = Life(tmp_path)
    yield life
    life.end()
    life.go.set()
    life.world.cold.close()


def test_a_block_goes_down_to_the_disk_and_comes_up_again(life):
    books, lower = life.world.books, life.world.lower
    assert life.where == ("active", "free", "unknown")
    books.close(life.sequence)
    assert life.where == ("cached", "free", "unknown")
    again = books.open(life.names, books.match(life.names, 2), max_tokens=12, expected_tokens=12)
    assert life.where == ("active", "free", "unknown")
    books.close(again)

    books.give_up(24)
    life.world.mover.move()
    assert life.where == ("free", "held", "unknown")
    lower.write_behind(life.hold)
    assert life.where == ("free", "copied", "spilling")
    life.end()
    assert life.where == ("free", "held", "held"), "it is in both places"
    lower.spill_all(life.hold)
    life.end()
    assert life.where == ("free", "stored", "held")
    life.fill_host_memory()
    assert life.where == ("free", "free", "held")

    restore = lower.restore([(G, life.name)])
    lower.submit(life.hold)
    assert life.where == ("free", "arriving", "pinned")
    life.end()
    assert restore.done
    assert life.where == ("free", "pinned", "held")
    lower.end(restore)
    assert life.where == ("free", "held", "held")

    restore = lower.restore([(group, name) for group in LAYOUT.groups for name in life.names.first(2)[:2]])
    lower.submit(None)
    life.end()
    assert restore.done
    again = books.open(life.names, books.match(life.names, 2), max_tokens=12, expected_tokens=12)
    lower.end(restore)
    life.world.mover.move()
    assert life.where == ("active", "held", "held")
    assert (life.world.pools.tensors[G][int(again.tables[G][0])] == 0.0).all(), "block n holds n"
    assert (life.world.pools.tensors[G][int(again.tables[G][1])] == 1.0).all()
    books.close(again)


def test_a_block_leaves_host_memory_while_it_is_written_and_the_disk_for_others(life):
    books, lower = life.world.books, life.world.lower
    books.close(life.sequence)
    books.give_up(24)
    life.world.mover.move()
    lower.spill_all(life.hold)
    assert life.where == ("free", "leaving", "spilling")
    life.end()
    assert life.where == ("free", "stored", "held")
    life.fill_host_memory()
    assert life.where == ("free", "free", "held")
    others = [key for key in life.world.cold.tier._books._held if key != (G, life.name)]
    assert life.world.cold.tier._books.make_room([(G, life.name), *others])
    assert life.where == ("free", "free", "unknown")
    assert books.match(life.names, 2).known == 0


def test_the_page_speaks_of_the_states_that_the_classes_define():
    page = hmt.__doc__ or ""
    for place in (BlockPool, ColdBooks, Index, HostTier):
        module = place.__module__.removeprefix("wicore_backend.hmt.")
        (listed,) = re.findall(rf"\(`{module}\.{place.__name__}`\): (.*?)[;.]\n", page, re.DOTALL)
        assert re.findall(r"\*(\w+)\*", listed) == re.findall(r"^\s*- \*(\w+)\*", place.__doc__ or "", re.MULTILINE)
