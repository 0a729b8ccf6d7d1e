"""What is remembered of blocks, cached or not, and what of it tells their future."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE, Access, Key
from wicore_backend.hmt.policy.reuse_forest import FEATURE_LEVELS

FEATURES = (
    "role",
    "uses",
    "recent_uses",
    "block_gap",
    "attention",
    "new_blocks",
    "known_blocks",
    "blocks",
    "turn",
    "session_gap",
)
"""Names of the features of a run, in order. The first five are the block's, the others its prompt's."""

ATTENTION = FEATURES.index("attention")

KNOWN, FRESH, PARTIAL = 0, 1, 2
"""Roles: a block that was seen before, one that was not, and the partial end of a prompt."""

_TOP = FEATURE_LEVELS - 1


def level(value: float, *, per_octave: int = 2) -> int:
    """A feature's level for a count or a ratio: steps of an octave's part, 0 for 0, bounded."""
    return min(_TOP, int(per_octave * math.log2(1.0 + value)))


def attention_level(relative_mass: float | None) -> int:
    """Level of a run's attention mass over the mean block's: 0 if it is not known, 8 for the mean."""
    if relative_mass is None:
        return 0
    return min(_TOP, max(1, 8 + round(2 * math.log2(max(relative_mass, 1e-6)))))


@dataclass(eq=False, slots=True)
class Prompt:
    """What one prompt says about the session it belongs to."""

    time: float
    full_blocks: int
    turn: int
    session_end: bool = False


@dataclass(eq=False, slots=True)
class Run:
    """Neighbouring blocks of a path that were last touched together and look alike; they share one fate.

    Attributes
    ----------
    features
        Levels, as `FEATURES` names them.
    depth
        Position of its first block in the path.
    blocks
        How many blocks the prompt had in it.
    sample
        Its name in the forest.
    probe
        The block whose next touch stands for the run's.
    touched
        When it was last let go of, or touched.
    evictable
        Its evictable blocks, the next victim first.
    """

    prompt: Prompt
    features: list[int]
    depth: int
    blocks: int
    sample: int
    probe: Key
    touched: float
    retain_until: float
    pending: bool = True
    settled: bool = False
    mass: float = 0.0
    masses: int = 0
    curve: Sequence[float] = ()
    fit: int = 0
    evictable: OrderedDict[Key, None] = field(default_factory=OrderedDict)


@dataclass(eq=False, slots=True)
class Record:
    """One block's past: uses ever, uses decayed to `time`, when it was touched last, and in which run."""

    uses: int
    recent: float
    time: float
    run: Run


class Span(NamedTuple):
    """Blocks `start` to `stop` - 1 of a prompt have these features in common."""

    start: int
    stop: int
    features: list[int]


class History:
    """Records of the blocks that were touched last, at most `limit` of them: the ghosts.

    Parameters
    ----------
    forgotten
        Called with a block, and the run it was of, that made room for another.

    Attributes
    ----------
    typical_gap
        Geometric mean of the time between touches of a block, in seconds, the recent ones weighing more. Decayed
        counts forget with two and a half times this, so that they follow the workload's own pace.
    """

    _PACE = 1 / 256

    def __init__(self, limit: int, forgotten: Callable[[Key, Run], None]) -> None:
        self._limit = limit
        self._forgotten = forgotten
        self._records: OrderedDict[Key, Record] = OrderedDict()
        self._log_gap = math.log(60.0)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def typical_gap(self) -> float:
        return math.exp(self._log_gap)

    def get(self, key: Key) -> Record | None:
        """The block's record, or None if it was never seen or is forgotten."""
        return self._records.get(key)

    def read(self, access: Access, now: float) -> tuple[Prompt, Iterator[Span | None]]:
        """What the past says about a prompt that arrives now: None in between is a breath."""
        records = [self._records.get(key) for key in access.keys]
        known = next((index for index, record in enumerate(records) if record is None), len(records))
        total = len(records)
        prompt = Prompt(now, access.partial_from, 0, access.session_end)
        gap = -1.0
        last = records[known - 1] if known else None
        if last is not None:
            former = last.run.prompt
            gap = now - former.time
            # A prompt that has all the full blocks of the one before it goes on where that one ended; a prompt that
            # leaves its path earlier only shares a beginning with it.
            if known >= max(2, former.full_blocks):
                prompt.turn = former.turn + 1
        common = [level(total - known), level(known), level(total), min(prompt.turn, _TOP), _gap_level(gap)]
        return prompt, self._spans(records, known, access.partial_from, common, now)

    def _spans(
        self, records: list[Record | None], known: int, partial_from: int, common: list[int], now: float
    ) -> Iterator[Span | None]:
        rate = -1 / (2.5 * self.typical_gap)
        start = 0
        current: list[int] = []
        before: tuple[int, float, float] | None = None
        for index, record in enumerate(records):
            if index % BLOCKS_AT_ONCE == BLOCKS_AT_ONCE - 1:
                yield None
            role = PARTIAL if index >= partial_from else KNOWN if index < known else FRESH
            past = None if record is None else (record.uses, record.recent, record.time)
            if index and past == before and role == current[0]:
                continue  # As most are: what was touched together has one past.
            before = past
            if past is None:
                own = [role, 0, 0, 0]
            else:
                uses, recent, time = past
                own = [role, level(uses), level(4 * recent * math.exp(rate * (now - time))), _gap_level(now - time)]
            if own != current:
                if index:
                    yield Span(start, index, [*current, 0, *common])
                start, current = index, own
        if records:
            yield Span(start, len(records), [*current, 0, *common])

    def touch(self, key: Key, run: Run, now: float) -> Run | None:
        """Count a use of the block, now of `run`; the answer is the run it was of before, if it is remembered."""
        record = self._records.get(key)
        if record is None:
            self._records[key] = Record(1, 1.0, now, run)
            if len(self._records) > self._limit:
                oldest, forgotten = self._records.popitem(last=False)
                self._forgotten(oldest, forgotten.run)
            return None
        former = record.run
        gap = now - record.time
        record.recent = 1.0 + record.recent * math.exp(-gap / (2.5 * self.typical_gap))
        if gap > 0:
            self._log_gap += self._PACE * (math.log(gap) - self._log_gap)
        record.uses += 1
        record.time = now
        record.run = run
        self._records.move_to_end(key)
        return former


def _gap_level(seconds: float) -> int:
    """Level of a time span, an octave each from 1/4 s on; 0 if there is none."""
    return 0 if seconds < 0 else 1 + min(_TOP - 1, int(math.log2(1.0 + 4 * seconds)))
