"""How long a step takes: a few coefficients, learnt from the steps as they pass. Pure arithmetic: no tensors, no clock.

A step's seconds are modelled as linear in what the step does, each coefficient at least 0:

    seconds = step + sequence * sequences + prefill_token * (tokens - sequences) + key * keys_read + pair * pairs
              + mixed, if it has both decodes and chunks of prompts

A step of decodes alone is one CUDA graph, and so is a short prompt by itself (`engine/graphs.py`, `engine/prompts.py`);
both together are computed layer by layer, by other kernels, which costs the same however short the chunks are.

A sequence brings its first token with it, so that `prefill_token` has no part in a step of decodes alone. One
coefficient for every token would tie prefill to decodes, which differ: weights that decodes wait for anyway make a
decode's own arithmetic free, while each prefill token is paid for.

The coefficients are followed by recursive least squares, with these choices:

- Errors count relative to the larger of observed and predicted seconds. So short and long steps weigh alike, and a step
  that a hiccup made 50 times longer has a row 50 times smaller than that of its healthy twin.
- Forgetting is directional (Kulhavý and Kárný, "Tracking of slowly varying parameters by directional forgetting", IFAC
  World Congress 1984): a step makes room only for what it tells about itself. Thousands of decode steps do not wear off
  what was learnt about prefill, and directions never seen keep their prior.
- An error is clipped against the scale of recent errors, widened by what the model does not know yet about such a step:
  a first prefill after decodes is a lesson, the same error in the thousandth decode is an outlier.
- A clipped error halves what is known about its direction, so that a part of the model that has gone wrong is mended
  while the rest is right.
- Errors that keep one sign are no outliers but another machine: each coefficient's variance is then widened by
  its own square, and the next few steps settle it. Steps with prefill chunks are judged by themselves: the many decodes
  between them, which are as expected, say nothing of them. Coefficients that these steps do not show stay as they are
  until one shows them; moving all by one factor would let decodes that are not quite linear carry prefill away.
- A coefficient that would become negative is set to 0 and the others move by their covariance with it, so that steps
  like those seen are still predicted well. Cutting it off alone would break the balance of collinear features.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf, sqrt
from statistics import median
from typing import NamedTuple

LONGEST_CHUNK = 131_072
"""Gemma-3's longest context: no prefill chunk has more tokens."""

_MEMORY = 0.995
"""Share of the knowledge about a step's direction that survives such a step: about the latest 200 of them count."""
_MEMORY_OF_CLIPPED = 0.5
"""The same for a step whose error was clipped: 8 such steps alike take over a direction, an outlier hardly shows."""
_CLIP = 3.0
"""Error scales at which an error is clipped."""
_DRIFT_RATE = 0.1
_DRIFT_LIMIT = 1.2
"""An average of clipped errors this far from 0 is a lasting change: 5 steps at the clip, 10 at two error scales. The
average of independent errors has a standard deviation of 0.23, so this is more than 5 of them."""
_SCALE_RATE = 0.02
_SCALE_MIN, _SCALE_START, _SCALE_MAX = 0.01, 0.1, 1.0
"""Error scale, as a share of the step: what a model as simple as this one can hope for, a first guess, and hopeless."""
_MEAN_OF_ABSOLUTE = 0.8
"""Mean of |u| for a standard normal u."""
_CONTEXT_WIDTH = 1e-4
"""Prior width of a key's cost to that of a step, and of a pair's to that of a token. From a model of a few million
weights to the 27B, bytes and arithmetic say 1/2500 down to 1/700000; what is seen soon outweighs it."""
_MIXED_WIDTH = 200
"""Tokens of prefill that take as long as a step's fixed part, about: 15 ms and 80 us for the 27B in bf16 on an H200. A
long first step is mostly its tokens, and having both decodes and prefill chunks costs no more than a step does."""
_IDENTITY = [tuple(float(i == j) for j in range(6)) for i in range(6)]


class StepShape(NamedTuple):
    """What a step computes, as far as its duration depends on it."""

    tokens: int
    """All tokens computed, decodes and prefill."""
    sequences: int
    keys_read: int
    """Keys of earlier steps that decodes and chunks attend to, each sequence's once, in a layer of the global group."""
    pairs: int
    """Query-key pairs of the prefill chunks, in one layer of the global group."""
    chunks: int = 0
    """Of the sequences, those that are prefilled; the others decode, guessed tokens with them or not."""

    @property
    def mixed(self) -> bool:
        """Whether it has both decodes and prefill chunks."""
        return 0 < self.chunks < self.sequences

    def with_prefill(self, tokens: int, context: int) -> StepShape:
        """This step and `tokens` more of one more sequence, of which `context` tokens have been computed before."""
        pairs = self.pairs + tokens * context + tokens * tokens // 2
        return StepShape(self.tokens + tokens, self.sequences + 1, self.keys_read + context, pairs, self.chunks + 1)

    def with_decode(self, context: int) -> StepShape:
        """This step and a decode more, of a sequence of which `context` tokens have been computed before."""
        return StepShape(self.tokens + 1, self.sequences + 1, self.keys_read + context, self.pairs, self.chunks)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds for each thing that a step does, all at least 0; `step` is what it costs whatever it does."""

    step: float
    sequence: float
    """A sequence with the first of its tokens: a decode, or a prefill chunk of one token."""
    prefill_token: float
    """Each further token of a sequence."""
    key: float
    pair: float
    mixed: float
    """Having both decodes and prefill chunks."""

    def seconds(self, shape: StepShape) -> float:
        """Duration of a step."""
        return (
            self.step
            + self.sequence * shape.sequences
            + self.prefill_token * (shape.tokens - shape.sequences)
            + self.key * shape.keys_read
            + self.pair * shape.pairs
            + self.mixed * shape.mixed
        )

    def prefill_tokens(self, decodes: StepShape, limit_s: float, context: int, *, most: int = LONGEST_CHUNK) -> int:
        """The most tokens of one more sequence's prefill that keep the step within `limit_s`, from 0 to `most`.

        Parameters
        ----------
        decodes
            What else the step computes.
        context
            Tokens of the prefilled sequence that have been computed before, which the chunk attends to.
        """
        if self.seconds(decodes.with_prefill(most, context)) <= limit_s:
            return most
        # A hair below the limit, so that rounding in seconds() never crosses it.
        rest = limit_s * (1 - 1e-12) - self.seconds(decodes.with_prefill(0, context))
        linear = self.prefill_token + self.pair * context
        if not rest > linear:  # Also for a limit that is no number.
            return 0
        # The root of pair / 2 * t^2 + linear * t = rest, in the form that is exact when `pair` is 0 or very small.
        return min(most, int(2 * rest / (linear + sqrt(linear * linear + 2 * self.pair * rest))))


class StepTimeModel:
    """Predicts a step's duration, and learns from each step that has been timed. One thread's: it holds no lock.

    Before the first observation every coefficient is 0. From the first on, the prior is that half of a step's time goes
    to the step and half to its tokens, whatever these are. While only decodes have been seen, a prefill token is
    taken to cost half of the cheapest decode: more than nothing, less than the steps seen cost per token.

    Parameters
    ----------
    ready_after
        Steps to observe before `ready`.
    error_window
        Latest steps that `error` is taken over.
    """

    def __init__(self, *, ready_after: int = 32, error_window: int = 128) -> None:
        self._ready_after = ready_after
        self._observed = 0
        self._prefill_seen = False
        self._errors: deque[float] = deque(maxlen=error_window)
        self._scale = _SCALE_START
        self._drift = {False: 0.0, True: 0.0}  # Of steps without prefill chunks, and with.
        # A coefficient is its unit (seconds, fixed by the first step) times its value; the covariance is of the values.
        self._units = [0.0] * 6
        self._values = [0.0] * 6
        self._covariance = _IDENTITY
        self._coefficients = [0.0] * 6

    @property
    def ready(self) -> bool:
        """Whether enough steps have been observed to rely on predictions."""
        return self._observed >= self._ready_after

    @property
    def error(self) -> float:
        """Median of |predicted - observed| / observed over the latest steps, each predicted before it was observed.

        It is 0 before the second step.
        """
        return median(self._errors) if self._errors else 0.0

    @property
    def coefficients(self) -> Coefficients:
        """What `predict` uses."""
        return Coefficients(*self._coefficients)

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step will take; it never falls when work is added, of whatever kind."""
        step, sequence, prefill_token, key, pair, mixed = self._coefficients
        tokens, sequences, keys_read, pairs, chunks = shape
        seconds = step + sequence * sequences + prefill_token * (tokens - sequences) + key * keys_read + pair * pairs
        return seconds + mixed if 0 < chunks < sequences else seconds

    def prefill_tokens(self, decodes: StepShape, limit_s: float, context: int, *, most: int = LONGEST_CHUNK) -> int:
        """See `Coefficients.prefill_tokens`."""
        return self.coefficients.prefill_tokens(decodes, limit_s, context, most=most)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn that a step has taken `seconds`; ValueError unless they are positive and finite."""
        if not 0 < seconds < inf:
            raise ValueError(f"a step took {seconds} s; pass the difference of two readings of a monotonic clock")
        if self._observed == 0:
            self._start(shape, seconds)
        else:
            predicted = self.predict(shape)
            self._errors.append(abs(predicted - seconds) / seconds)
            self._learn(shape, seconds, predicted)
        self._observed += 1
        if not self._prefill_seen:
            self._guess_prefill(shape, seconds)

    def _start(self, shape: StepShape, seconds: float) -> None:
        per_token = seconds / max(1, shape.tokens)
        mixed = min(seconds, _MIXED_WIDTH * per_token)
        self._units = [seconds, per_token, per_token, _CONTEXT_WIDTH * seconds, _CONTEXT_WIDTH * per_token, mixed]
        self._values = [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
        self._covariance = _IDENTITY
        self._coefficients = [value * unit for value, unit in zip(self._values, self._units, strict=True)]

    def _guess_prefill(self, shape: StepShape, seconds: float) -> None:
        """Until a prefill shows its price, half of the cheapest token so far, which no hiccup makes dearer."""
        self._prefill_seen = shape.tokens > shape.sequences
        if not self._prefill_seen and shape.tokens:
            guess = 0.5 * seconds / shape.tokens
            self._coefficients[2] = min(self._coefficients[2], guess)
            self._values[2] = self._coefficients[2] / self._units[2]

    def _learn(self, shape: StepShape, seconds: float, predicted: float) -> None:
        """One step of recursive least squares, on a row in units of the expected error."""
        weight = 1 / (self._scale * max(seconds, predicted))
        u0, u1, u2, u3, u4, u5 = self._units
        x0 = weight * u0
        x1 = weight * u1 * shape.sequences
        x2 = weight * u2 * (shape.tokens - shape.sequences)
        x3 = weight * u3 * shape.keys_read
        x4 = weight * u4 * shape.pairs
        x5 = weight * u5 * shape.mixed
        # The prediction's covariance with the values, and its variance.
        p0, p1, p2, p3, p4, p5 = p = [
            a * x0 + b * x1 + c * x2 + d * x3 + e * x4 + f * x5 for a, b, c, d, e, f in self._covariance
        ]
        variance = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3 + p4 * x4 + p5 * x5
        if variance <= 0:  # Steps a million times longer than others have left nothing but rounding.
            self._start(shape, seconds)
            return

        spread = sqrt(1 + variance)
        error = (seconds - predicted) * weight / spread
        clipped = min(_CLIP, max(-_CLIP, error))
        gain = clipped / spread
        self._values = [value + gain * g for value, g in zip(self._values, p, strict=True)]
        self._forget_and_narrow(p, variance, _MEMORY if clipped == error else _MEMORY_OF_CLIPPED)
        self._follow_errors(clipped, prefills=shape.chunks > 0)
        self._keep_positive()
        self._coefficients = [value * unit for value, unit in zip(self._values, self._units, strict=True)]

    def _forget_and_narrow(self, p: list[float], variance: float, memory: float) -> None:
        """The covariance after a row: 1 / variance becomes memory * (1 / variance + 1); no other direction widens."""
        factor = (memory * variance - (1 - memory)) / (variance * memory * (1 + variance))
        root = sqrt(abs(factor))
        # One product for both halves of the matrix, so that it stays symmetric to the last bit.
        h0, h1, h2, h3, h4, h5 = h = [root * g for g in p]
        sign = -1.0 if factor > 0 else 1.0
        self._covariance = [
            (a + s * h0, b + s * h1, c + s * h2, d + s * h3, e + s * h4, f + s * h5)
            for (a, b, c, d, e, f), s in zip(self._covariance, [sign * g for g in h], strict=True)
        ]

    def _follow_errors(self, clipped: float, *, prefills: bool) -> None:
        """Follow the scale of errors, and their drift, which tells a changed machine from outliers."""
        scale = self._scale * (1 + _SCALE_RATE * (abs(clipped) / _MEAN_OF_ABSOLUTE - 1))
        self._scale = min(_SCALE_MAX, max(_SCALE_MIN, scale))
        self._drift[prefills] += _DRIFT_RATE * (clipped - self._drift[prefills])
        if abs(self._drift[prefills]) > _DRIFT_LIMIT:
            self._drift = dict.fromkeys(self._drift, 0.0)
            self._widen()

    def _widen(self) -> None:
        """Admit that the machine has changed: each coefficient may be off by all of itself."""
        self._covariance = [
            (*row[:i], row[i] + value * value, *row[i + 1 :])
            for i, (row, value) in enumerate(zip(self._covariance, self._values, strict=True))
        ]

    def _keep_positive(self) -> None:
        """Condition the values on none being negative, the most negative first."""
        for _ in self._values:
            lowest = min(self._values)
            i = self._values.index(lowest)
            row = self._covariance[i]
            if lowest >= 0 or row[i] <= 0:
                break
            shift = lowest / row[i]
            self._values = [value - shift * c for value, c in zip(self._values, row, strict=True)]
            self._values[i] = 0.0
        self._values = [max(0.0, value) for value in self._values]
