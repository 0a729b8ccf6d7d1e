"""Learns, while serving, when blocks are asked for again: a small forest of survival trees.

A sample is a run of blocks that were touched together: what was known of it then (a few small integers), and how long
it took until it was touched again, or that it has not happened yet. A tree splits the samples where the likelihood of a
piecewise constant hazard gains most, as in survival trees (LeBlanc and Crowley, Biometrics 1992), so that "whether"
and "when" are learnt at once and samples that wait still count. A leaf's hazard leans on its parent's where it saw
little. The forest is the mean of a few trees that were fitted one after the other as samples came; the oldest is
replaced, so that a refit is short and the past is forgotten. Ages are on a geometric grid: nothing here knows the time
scale of the workload.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

T = TypeVar("T")
Work: TypeAlias = Generator[int, None, T]
"""Something that is done in parts: yields how much work each was, and returns what came of it."""

FEATURE_LEVELS = 24
"""Features are integers from 0 to this, exclusive."""

_PART = 16_384
"""Of a fit, without a breath: samples times features that are looked at."""

_WORK_AT_ONCE = 24_576
"""The same, in a call: with the part that goes beyond it, less than 2 ms."""

_LEAST_WORK = 2048
"""What a look at few samples costs in the same terms."""

AGES: Floats = np.concatenate([[0.0], 0.5 * 1.35 ** np.arange(41)])
"""Edges of the age grid in seconds, 0.5 s to about a day; the last interval is open."""

_WIDTHS: Floats = np.append(np.diff(AGES), AGES[-1])
_AGE_LIST: list[float] = AGES.tolist()


def age_index(age: float) -> int:
    """The interval of the grid that `age` (seconds, not negative) lies in."""
    return bisect_right(_AGE_LIST, age) - 1


def worth_by_age(hazard: Floats) -> list[float]:
    """What keeping a block is worth at each age of the grid: hits per second held, at the best time to stop.

    From the middle of an interval on, for each later edge at which one could give up: the chance of a hit until then
    over the expected time held. The best of these ratios, not the hazard of the moment, ranks blocks, because reuse
    comes in waves: nobody answers in a second, many in a minute.

    Parameters
    ----------
    hazard
        Hits per second in each interval of the grid, [K].
    """
    cumulative = np.minimum(np.concatenate([[0.0], np.cumsum(hazard * _WIDTHS)]), 40.0)
    survival = np.exp(-cumulative)
    held = np.concatenate([[0.0], np.cumsum(-np.diff(survival) / hazard)])
    middle = np.exp(-np.minimum((cumulative[:-1] + cumulative[1:]) / 2, 40.0))
    middle_held = held[:-1] + (survival[:-1] - middle) / hazard
    # Row k starts in the middle of interval k, column j gives up at the end of interval j.
    hits = middle[:, None] - survival[None, 1:]
    time = held[None, 1:] - middle_held[:, None]
    possible = np.triu(np.ones(hits.shape, np.bool_)) & (time > 1e-12 * held[-1])
    ratio = np.where(possible, hits / np.where(possible, time, 1.0), 0.0).max(axis=1)
    worth: list[float] = np.where(possible.any(axis=1), ratio, hazard).tolist()
    return worth


@dataclass(frozen=True, slots=True)
class ForestSettings:
    """How the forest learns. Around these values hit rates are flat (docs/benchmarks/replacement.md).

    Attributes
    ----------
    trees, leaves
        Trees of the forest, and the most leaves of one.
    samples
        The newest samples that are kept.
    refit_share
        A tree is replaced whenever this share of the kept samples is new.
    min_samples
        Samples on either side of a split, and before the first tree.
    min_gain
        Log-likelihood that a split has to gain.
    prior_hits
        Hits that the parent's hazard counts for in a leaf.
    """

    trees: int = 5
    leaves: int = 32
    samples: int = 16_384
    refit_share: float = 0.05
    min_samples: int = 40
    min_gain: float = 12.0
    prior_hits: float = 8.0


@dataclass(frozen=True, slots=True)
class _Tree:
    """Nodes by index, root first: feature (-1 in a leaf), highest level that goes left, children, hazard."""

    feature: list[int]
    threshold: list[int]
    left: list[int]
    right: list[int]
    hazard: list[Floats]

    def leaf(self, features: Sequence[int]) -> int:
        node = 0
        while (feature := self.feature[node]) >= 0:
            node = self.left[node] if features[feature] <= self.threshold[node] else self.right[node]
        return node


class ReuseForest:
    """Samples in, worth by age out.

    Parameters
    ----------
    features
        How many features a sample has.
    """

    def __init__(self, features: int, settings: ForestSettings) -> None:
        self._settings = settings
        size = settings.samples
        self._features = np.zeros((features, size), np.int64)
        self._weight = np.zeros(size)
        self._start = np.zeros(size)
        self._end = np.full(size, math.nan)
        self._hit = np.zeros(size, np.bool_)
        self._count = 0
        self._next_fit = 5 * settings.min_samples
        self._trees: list[_Tree] = []
        self._curves: dict[tuple[int, ...], list[float]] = {}
        self._fitting: Work[None] | None = None
        self.fits = 0

    def begin(self, features: Sequence[int], blocks: int, now: float) -> int:
        """A run of `blocks` blocks was touched; the answer names the sample in the calls below."""
        sample = self._count
        slot = sample % self._settings.samples
        self._features[:, slot] = features
        # Blocks of a run share their fate, so a run of n is more than one witness and less than n.
        self._weight[slot] = math.sqrt(blocks)
        self._start[slot] = now
        self._end[slot] = math.nan
        self._hit[slot] = False
        self._count += 1
        return sample

    def change(self, sample: int, features: Sequence[int], now: float) -> None:
        """More is known of a sample, whose age counts from now."""
        if self._count - sample <= self._settings.samples:
            slot = sample % self._settings.samples
            self._features[:, slot] = features
            self._start[slot] = now

    def end(self, sample: int, now: float, *, hit: bool) -> None:
        """The run was touched again, or nobody will notice any more if it is."""
        if self._count - sample <= self._settings.samples:
            slot = sample % self._settings.samples
            self._end[slot] = now
            self._hit[slot] = hit

    def worth(self, features: Sequence[int]) -> list[float] | None:
        """Worth of keeping a block at each age of the grid, or None as long as nothing was learnt."""
        if not self._trees:
            return None
        leaves = tuple(tree.leaf(features) for tree in self._trees)
        curve = self._curves.get(leaves)
        if curve is None:
            hazards = [tree.hazard[leaf] for tree, leaf in zip(self._trees, leaves, strict=True)]
            curve = self._curves[leaves] = worth_by_age(np.mean(hazards, axis=0))
        return curve

    def learn(self, now: float) -> bool:
        """Do the next part of learning, a millisecond's work and not a tree's; whether there was something to learn."""
        if self._fitting is None:
            if self._count < self._next_fit:
                return False
            self._fitting = self._fit(now)
        work = 0
        for part in self._fitting:
            work += part
            if work >= _WORK_AT_ONCE:
                return True
        self._fitting = None
        return True

    def _fit(self, now: float) -> Work[None]:
        """Replace the oldest tree by one of the samples that there are now."""
        settings = self._settings
        kept = min(self._count, settings.samples)
        self._next_fit = self._count + max(settings.min_samples, round(settings.refit_share * kept))
        hit = self._hit[:kept].copy()
        if np.count_nonzero(hit) < settings.min_samples:
            return
        end = self._end[:kept]
        age = np.maximum(np.where(np.isnan(end), now, end) - self._start[:kept], 0.0)
        weight = self._weight[:kept] / self._weight[:kept].mean()
        features = self._features[:, :kept].copy()
        yield kept
        fit = _Fit(features, age, hit, weight, settings)
        yield kept
        tree = yield from fit.tree()
        self._trees = [*self._trees[-(settings.trees - 1) :], tree] if settings.trees > 1 else [tree]
        self._curves.clear()
        self.fits += 1


class _Exposure:
    """Hits and time at risk of samples in the intervals of an age grid, summed over groups of samples."""

    def __init__(self, edges: Floats, age: Floats, hit: NDArray[np.bool_], weight: Floats) -> None:
        self.intervals = len(edges)
        self._widths = np.diff(edges)
        self.index = np.searchsorted(edges, age, side="right") - 1
        self._hit = np.where(hit, weight, 0.0)
        self._weight = weight
        self._rest = weight * (age - edges[self.index])

    def sums(self, chosen: Ints, code: Ints, groups: int) -> tuple[Floats, Floats]:
        """Hits and seconds at risk of the samples `chosen`, each [groups, K].

        `code`, [n] or [columns, n] for n samples, is group times K plus interval.
        """
        size = groups * self.intervals
        columns = 1 if code.ndim == 1 else len(code)
        flat = code.ravel()

        def total(values: Floats) -> Floats:
            summed = np.bincount(flat, np.tile(values[chosen], columns), size).astype(np.float64)
            return summed.reshape(groups, self.intervals)

        hits, rest, weight = total(self._hit), total(self._rest), total(self._weight)
        beyond = weight[:, ::-1].cumsum(axis=1)[:, ::-1] - weight
        rest[:, :-1] += beyond[:, :-1] * self._widths
        return hits, rest


class _Fit:
    """One tree, grown best split first, from samples whose features are [features, samples]."""

    _COARSE = 7

    def __init__(
        self, features: Ints, age: Floats, hit: NDArray[np.bool_], weight: Floats, settings: ForestSettings
    ) -> None:
        self._features = features
        self._settings = settings
        inner = np.unique(np.quantile(age[hit], np.linspace(0, 1, self._COARSE + 1)[1:-1]))
        self._coarse = _Exposure(np.concatenate([[0.0], inner[inner > 0]]), age, hit, weight)
        self._fine = _Exposure(AGES, age, hit, weight)

    def tree(self) -> Work[_Tree]:
        tree = _Tree([], [], [], [], [])
        everything = np.arange(self._features.shape[1])
        split = yield from self._best_split(everything)
        open_nodes = [(split, self._grow(tree, everything, None), everything)]
        leaves = 1
        while leaves < self._settings.leaves:
            best = max(range(len(open_nodes)), key=lambda index: open_nodes[index][0][0])
            (gain, feature, threshold), node, chosen = open_nodes[best]
            if gain < self._settings.min_gain:
                break
            open_nodes.pop(best)
            goes_left = self._features[feature, chosen] <= threshold
            tree.feature[node], tree.threshold[node] = feature, threshold
            for side, part in ((tree.left, chosen[goes_left]), (tree.right, chosen[~goes_left])):
                side[node] = self._grow(tree, part, tree.hazard[node])
                split = yield from self._best_split(part)
                open_nodes.append((split, side[node], part))
            leaves += 1
        return tree

    def _grow(self, tree: _Tree, chosen: Ints, parent: Floats | None) -> int:
        hits, risk = (sums[0] for sums in self._fine.sums(chosen, self._fine.index[chosen], 1))
        if parent is None:
            # Ages that nobody has reached yet: reuse thins out with age.
            thinning = 1.0 / (AGES + _WIDTHS / 2)
            prior, parent = 0.5, thinning * hits.sum() / (risk * thinning).sum()
        else:
            prior = self._settings.prior_hits
        for nodes in (tree.feature, tree.threshold, tree.left, tree.right):
            nodes.append(-1)
        tree.hazard.append((hits + prior) / (risk + prior / parent))
        return len(tree.feature) - 1

    def _best_split(self, chosen: Ints) -> Work[tuple[float, int, int]]:
        """Gain, feature, and the highest level that goes left; a gain of 0 where no split is allowed."""
        columns, intervals = len(self._features), self._coarse.intervals
        hits, risk = np.empty((2, columns, FEATURE_LEVELS, intervals))
        left = np.empty((columns, FEATURE_LEVELS), np.int64)
        at_once = max(1, _PART // len(chosen))
        for first in range(0, columns, at_once):
            some = slice(first, min(columns, first + at_once))
            count = some.stop - first
            levels = self._features[some, chosen] + FEATURE_LEVELS * np.arange(count)[:, None]
            code = levels * intervals + self._coarse.index[chosen]
            sums = self._coarse.sums(chosen, code, count * FEATURE_LEVELS)
            hits[some], risk[some] = (part.reshape(count, FEATURE_LEVELS, intervals) for part in sums)
            left[some] = np.bincount(levels.ravel(), minlength=count * FEATURE_LEVELS).reshape(count, FEATURE_LEVELS)
            yield count * len(chosen) + _LEAST_WORK
        hits, risk, left = hits.cumsum(axis=1), risk.cumsum(axis=1), left.cumsum(axis=1)
        fewest = self._settings.min_samples
        allowed = (left >= fewest) & (len(chosen) - left >= fewest)
        if not allowed.any():
            return 0.0, -1, -1
        all_hits, all_risk = hits[:, -1:], risk[:, -1:]
        gain = _log_likelihood(hits, risk) + _log_likelihood(all_hits - hits, all_risk - risk)
        gain = np.where(allowed, gain - _log_likelihood(all_hits, all_risk), 0.0)
        feature, threshold = divmod(int(gain.argmax()), FEATURE_LEVELS)
        return float(gain[feature, threshold]), feature, threshold


def _log_likelihood(hits: Floats, risk: Floats) -> Floats:
    """Of piecewise constant hazards at their best, up to what splits have in common."""
    happened = hits > 1e-9
    rate = np.where(happened, hits, 1.0) / np.where(happened, np.maximum(risk, 1e-9), 1.0)
    terms: Floats = np.where(happened, hits * np.log(rate), 0.0).sum(axis=-1)
    return terms
