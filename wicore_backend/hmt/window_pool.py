"""Books of the local group's device blocks, which are kept by windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wicore_backend.hmt.block_pool import BlockAccountingError, BlockPool, GivenUp, nothing_cached
from wicore_backend.hmt.policy.base import Policy
from wicore_backend.hmt.victims import Victims


@dataclass(eq=False, slots=True)
class CachedRun:
    """Consecutive blocks that are kept, and recycled, together.

    Attributes
    ----------
    name
        Of the last block: names are chained, so it tells what all of them hold.
    idle
        How many of the blocks no sequence uses.
    """

    name: bytes
    blocks: tuple[int, ...]
    idle: int


class WindowPool(BlockPool):
    """Blocks are kept and recycled by windows, which may overlap: those of the local group.

    Where windows overlap, they have the same blocks. So a block is kept until the last of its windows is recycled.
    """

    def __init__(self, num_blocks: int, given_up: GivenUp | None = None, policy: Policy | None = None) -> None:
        super().__init__(num_blocks, given_up)
        self._victims: Victims[CachedRun] = Victims(policy)
        self._run_blocks = 1  # of the longest window seen
        self._runs: dict[bytes, CachedRun] = {}
        self._holders: list[tuple[CachedRun, ...]] = [()] * num_blocks

    @property
    def victims(self) -> Victims[CachedRun]:
        """See BlockPool."""
        return self._victims

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """See BlockPool. A window that is kept already counts as used; a new one has what is kept of it already."""
        name = names[-1]
        if (run := self._runs.get(name)) is not None:
            if run.idle:
                self._victims.use(name)
                self._victims.add([name], [run])
            return
        named, users = self._named, self._users
        own = tuple([named.setdefault(*pair) for pair in zip(names, blocks, strict=True)])
        run = self._runs[name] = CachedRun(name, own, idle=sum(not users[block] for block in own))
        if run.idle:
            self._victims.add([name], [run])
        self._run_blocks = max(self._run_blocks, len(own))
        holders, own_names = self._holders, self._names
        alone = (run,)
        for block_name, block in zip(names, own, strict=True):
            holders[block] = holders[block] + alone if holders[block] else alone
            own_names[block] = block_name

    def drop_all(self) -> None:
        """See BlockPool."""
        self._victims.clear()
        for run in list(self._runs.values()):
            self._drop(run, None)

    def _taken_up(self, block: int) -> None:
        for run in self._holders[block]:
            run.idle -= 1
            if not run.idle:
                self._victims.use(run.name)

    def _let_go(self, blocks: Sequence[int]) -> None:
        holders = self._holders
        idle: list[CachedRun] = []
        for block in blocks:
            for run in holders[block]:
                if not run.idle:
                    idle.append(run)
                run.idle += 1
        if idle:
            self._victims.add([run.name for run in idle], idle)

    def _recycle(self, count: int) -> None:
        enough = len(self._free) + count
        while len(self._free) < enough:
            if not self._victims:
                raise nothing_cached()
            self._drop(self._victims.take(1)[0], self._given_up)

    def tend(self, now: float, count: int) -> None:
        """See BlockPool."""
        self._victims.tend(now, -(-(count - len(self._free)) // self._run_blocks))

    def _drop(self, run: CachedRun, given_up: GivenUp | None) -> None:
        del self._runs[run.name]
        holders = self._holders
        unheld = []
        for block in run.blocks:
            held = holders[block]
            if len(held) == 1:
                holders[block] = ()
                unheld.append(block)
            else:
                at = held.index(run)
                holders[block] = held[:at] + held[at + 1 :]
        self._unname(unheld, given_up)

    def _check_cached(self, cached: set[int]) -> None:
        held: dict[int, set[CachedRun]] = {}
        for run in self._runs.values():
            for block in run.blocks:
                held.setdefault(block, set()).add(run)
        holders = {block: set(runs) for block, runs in enumerate(self._holders) if runs}
        if holders != held or held.keys() != set(self._named.values()):
            raise BlockAccountingError("the blocks' windows are not those that are kept")
        for run in self._runs.values():
            if run.idle != len(cached.intersection(run.blocks)):
                raise BlockAccountingError(f"a window counts {run.idle} idle blocks, which is wrong")
            if (run.name in self._victims) != bool(run.idle):
                raise BlockAccountingError("a window can be recycled that is all in use, or cannot though it is not")
        if any(self._runs.get(run.name) is not run for run in self._victims):
            raise BlockAccountingError("a window can be recycled that is not kept")
        self._victims.check_integrity()
