"""A2CR, attention-aware cache replacement: keeps the blocks that earn most hits for the time they take up.

What a block's past says (uses and recent uses, which outlive its eviction; the gap before its last use; the share of
attention it got; its prompt's length, how much of that was new, the turn of the session, the pace of the session) goes
into a survival forest that learns from the workload itself when such blocks come back (`reuse_forest.py`). A block's
score is the worth of keeping it at its age, times what a hit saves (the cost to recompute it less the cost to restore
it), with the hints of the request above that.

Blocks that one prompt touched together and that look alike are one `Run` with one score, so that scores are kept for
runs, not for blocks. A run's score is a step function of its age: a heap orders runs by score, another by when their
score changes next. Every call is O(log n), amortized.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE, Access, Key, Policy, no_victim
from wicore_backend.hmt.policy.history import (
    ATTENTION,
    FEATURES,
    FRESH,
    PARTIAL,
    History,
    Prompt,
    Run,
    attention_level,
)
from wicore_backend.hmt.policy.reuse_forest import AGES, ForestSettings, ReuseForest, age_index
from wicore_backend.hmt.policy.victim_heap import VictimHeap

_EDGES: list[float] = AGES.tolist()

_ADOPTED_RUN = 64
"""Blocks that a former process stored one after the other are taken to belong together, so many at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class A2CRSettings:
    """Settings of the learnt form.

    Attributes
    ----------
    ghost_multiple
        Blocks remembered, as a multiple of the capacity.
    min_ghosts
        Blocks remembered at least: a small tier sees as many sessions as a large one.
    retained_share
        Most of the capacity that requests can hold with `retain_seconds`; more is treated like any other block.
    """

    ghost_multiple: int = 16
    min_ghosts: int = 65_536
    retained_share: float = 0.5
    forest: ForestSettings = field(default_factory=ForestSettings)


@dataclass(frozen=True, slots=True)
class ScoreTerms:
    """A block's score, broken into its terms.

    Attributes
    ----------
    score
        Hits per second of holding it, times `saving`; the lowest leaves first.
    hits_per_second
        The learnt worth at the block's age.
    saving
        What one hit saves, in units of the tier's choice.
    age
        Seconds since it was let go of.
    retained
        Whether a request's hint keeps it behind all blocks without one.
    features
        The levels that the forest looked at, by name.
    """

    score: float
    hits_per_second: float
    saving: float
    age: float
    retained: bool
    features: dict[str, int]


class A2CR(Policy):
    """The learnt form.

    Parameters
    ----------
    saving
        What a hit on the block at this position of its path (0 is the root) saves, for instance its recompute time
        less its restore time, in seconds. Blocks are equal without it. It may change with time; a score takes it in
        when its run is touched.
    """

    def __init__(
        self,
        capacity: int,
        settings: A2CRSettings | None = None,
        *,
        saving: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(capacity)
        self._settings = settings or A2CRSettings()
        self._saving = saving
        ghosts = max(self._settings.min_ghosts, self._settings.ghost_multiple * capacity)
        self._history = History(ghosts, lambda key, run: self._close(key, run, hit=False))
        self._forest = ReuseForest(len(FEATURES), self._settings.forest)
        self._home: dict[Key, Run] = {}
        self._scores: VictimHeap[Run] = VictimHeap()
        self._changes: VictimHeap[Run] = VictimHeap()
        self._mean_mass = 0.0
        self._retained = 0
        self._retentions: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._home)

    def observe(self, access: Access) -> None:
        self.think()
        for _ in self.observing(access):
            pass

    def think(self) -> bool:
        """Learn from what has been observed."""
        return self._forest.learn(self.now)

    def observing(self, access: Access) -> Iterator[None]:
        """See Policy."""
        prompt, spans = self._history.read(access, self.now)
        retain_until = self._retain(access)
        for span in spans:
            if span is None:
                yield
                continue
            start, stop, features = span
            run = Run(
                prompt=prompt,
                features=features,
                depth=start,
                blocks=stop - start,
                sample=self._forest.begin(features, stop - start, self.now),
                probe=access.keys[(start + stop) // 2],
                touched=self.now,
                retain_until=retain_until,
            )
            for count, key in enumerate(access.keys[start:stop], start=1):
                if count % BLOCKS_AT_ONCE == 0:
                    yield
                former = self._history.touch(key, run, self.now)
                if former is not None:
                    run.retain_until = max(run.retain_until, former.retain_until)
                    self._close(key, former, hit=True)

    def _close(self, key: Key, run: Run, *, hit: bool) -> None:
        """Tell the forest how it went for the run's probe, the first time that is known."""
        if run.pending and run.probe == key:
            run.pending = False
            self._forest.end(run.sample, self.now, hit=hit)

    def _retain(self, access: Access) -> float:
        """Until when the prompt's blocks are retained; not at all if requests already hold their share."""
        while self._retentions and self._retentions[0][0] <= self.now:
            self._retained -= heapq.heappop(self._retentions)[1]
        blocks = len(access.keys)
        limit = self._settings.retained_share * self.capacity
        if not access.retain_seconds or access.retain_seconds <= 0 or self._retained + blocks > limit:
            return self.now
        until = self.now + access.retain_seconds
        self._retained += blocks
        heapq.heappush(self._retentions, (until, blocks))
        return until

    def attend(self, key: Key, mass: float) -> None:
        """Decoding gave `key` this share of its attention. The mean of a run's blocks becomes a feature of the run."""
        record = self._history.get(key)
        if record is not None and math.isfinite(mass):
            record.run.mass += mass
            record.run.masses += 1
            self._mean_mass += (mass - self._mean_mass) / 1024 if self._mean_mass else mass

    def add(self, key: Key) -> None:
        record = self._history.get(key)
        if record is None:
            self.observe(Access(keys=[key]))
            record = self._history.get(key)
            assert record is not None
        run = record.run
        if not run.settled:
            self._settle(run)
        self._home[key] = run
        run.evictable[key] = None
        if len(run.evictable) == 1:
            self._rank(run)

    def adopt(self, keys: Sequence[Key]) -> None:
        """See Policy. Nothing is learnt from such blocks: when they were used is not known."""
        prompt = Prompt(self.now, full_blocks=0, turn=0)
        features = [FRESH] + [0] * (len(FEATURES) - 1)
        for start in range(0, len(keys), _ADOPTED_RUN):
            part = keys[start : start + _ADOPTED_RUN]
            run = Run(
                prompt=prompt,
                features=features,
                depth=0,
                blocks=len(part),
                sample=0,
                probe=part[0],
                touched=self.now,
                retain_until=self.now,
                pending=False,
                settled=True,
            )
            for key in part:
                self._history.touch(key, run, self.now)
                self._home[key] = run
                run.evictable[key] = None
            self._rank(run)

    def use(self, key: Key) -> None:
        self._leave(key)

    def evict(self) -> Key:
        self._follow_changes()
        lowest = self._scores.peek()
        if lowest is None:
            raise no_victim("a2cr")
        key = next(iter(lowest[1].evictable))
        self._leave(key)
        return key

    def dearest(self) -> Iterator[Key]:
        self._follow_changes()
        return chain.from_iterable(reversed(run.evictable) for run in self._scores.highest())

    def discard(self, key: Key) -> None:
        if key in self._home:
            self._leave(key)

    def admit(self, key: Key) -> bool:
        """Whether the block's score is above that of the block that would leave for it, or that one is of its run.

        Of a run the deepest block leaves first, for one nearer to the root.
        """
        self._follow_changes()
        record, lowest = self._history.get(key), self._scores.peek()
        if len(self) < self.capacity or lowest is None:
            return True
        return record is not None and (record.run is lowest[1] or self._score(record.run) > lowest[0])

    def explain(self, key: Key) -> ScoreTerms | None:
        """The block's score and what it is made of, or None if nothing is known of the block."""
        record = self._history.get(key)
        if record is None:
            return None
        run = record.run
        retained, score = self._score(run)
        saving = self._saving_of(run)
        return ScoreTerms(
            score=score,
            hits_per_second=score / saving if saving else 0.0,
            saving=saving,
            age=self.now - run.touched,
            retained=retained,
            features=dict(zip(FEATURES, run.features, strict=True)),
        )

    def _settle(self, run: Run) -> None:
        """The run's prompt is done with it: its age counts from now, and its attention is known."""
        run.settled = True
        run.touched = self.now
        mass = run.mass / run.masses / self._mean_mass if run.masses and self._mean_mass > 0 else None
        run.features[ATTENTION] = attention_level(mass)
        run.curve = ()
        if run.pending:
            self._forest.change(run.sample, run.features, self.now)

    def _curve(self, run: Run) -> Sequence[float]:
        """The run's worth by age, as the forest sees it now."""
        if run.fit != self._forest.fits or not run.curve:
            run.fit = self._forest.fits
            # As long as nothing is learnt: uses over age, which is LRU among blocks of equal use.
            uses = 0.0 if run.features[0] == PARTIAL else 1.0 + run.features[1]
            run.curve = self._forest.worth(run.features) or [uses / (1.0 + age) for age in _EDGES]
        return run.curve

    def _saving_of(self, run: Run) -> float:
        return 1.0 if self._saving is None else max(0.0, self._saving(run.depth + run.blocks // 2))

    def _score(self, run: Run) -> tuple[bool, float]:
        """Order of the run now: retained runs last, then by worth."""
        age = max(0.0, self.now - run.touched)
        worth = 0.0 if _is_over(run.prompt, run) else self._curve(run)[age_index(age)] * self._saving_of(run)
        return run.retain_until > self.now, worth

    def _rank(self, run: Run) -> None:
        """Put the run where its score belongs, and note when that changes."""
        score = self._score(run)
        self._scores.push(run, score)
        index = age_index(max(0.0, self.now - run.touched)) + 1
        # Rounding can put an edge that is due at this very moment ahead of the age.
        while index < len(_EDGES) and run.touched + _EDGES[index] <= self.now:
            index += 1
        due = run.touched + _EDGES[index] if index < len(_EDGES) else math.inf
        if score[0]:
            due = min(due, run.retain_until)  # later than now, or the run would not be retained
        if due < math.inf:
            self._changes.push(run, due)
        elif run in self._changes:
            self._changes.remove(run)

    def _follow_changes(self) -> None:
        while (change := self._changes.peek()) is not None and change[0] <= self.now:
            self._rank(change[1])

    def _leave(self, key: Key) -> None:
        run = self._home.pop(key)
        del run.evictable[key]
        if not run.evictable:
            self._scores.remove(run)
            if run in self._changes:
                self._changes.remove(run)


def _is_over(prompt: Prompt, run: Run) -> bool:
    """Whether the request said that its session ends, and nobody else has used the run's blocks."""
    return prompt.session_end and run.features[1] <= 2 * math.log2(2.0 + prompt.turn)
