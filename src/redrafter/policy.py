"""Which beam shape each step decodes with. It changes the speed and never the output."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from redrafter.params import PLAIN, DecodeConfig

HYSTERESIS, ALIKE = 0.03, 0.02
"""A shape must promise so much more than the one in use. Of those that promise hardly less than the best, the one whose
step is shortest is used: what a step takes is known, what it gives a forecast."""
PROBE_EVERY, PROBE_STEPS = 96, 3
"""Steps from one try of another shape to the next, and how many it takes: 3 % of them. Only those between the first,
before which the drafter may have to catch up, and the last, during which that happens again, teach a time."""
FIRST_PROBE = 16
"""The same when a number of rows is met for the first time."""
PROBE_RATE, UNSURE_PROBE_RATE, SURE_STEPS = 0.85, 0.6, 5
"""Shapes below this share of the best one's expected rate are not tried; the second until they were seen so often, for
the few times at start-up may have met a busy moment."""
PLAIN_PROBE_EVERY, PLAIN_PROBE_MOST, HOPELESS_PROBE_EVERY = 64, 512, 1536
"""The same beside plain decoding, after pauses that double; the last where what was once measured would not pay."""
COST_GAIN = 0.1
"""How far an observed time moves what is believed."""
START_WEIGHT = 1
"""The times measured at start-up count as so many steps: the caches were cold and the text short."""
OUTLIER, GUESS_OUTLIER = 1.1, 16.0
"""A time further off than this factor is believed no more than that; the second while there is but a guess. A step can
be held up and hardly hurried: where n times are known, a shorter one is believed down to 1 / (1 + 1 / n)."""
YIELD_STEPS = 48
"""Steps over which acceptance is averaged; one of n rows counts as sqrt(n) of one row: a batch follows sooner."""
PRIOR_STEPS = 4.0
RECHECK_STEPS = 8.0
"""What was seen before speculation was turned off counts as at most so many steps when it is tried again."""
GRID_STEP, GRID_HALF = 1.06, 60
"""The learnt exponent is one of GRID_STEP^k, |k| <= GRID_HALF: 0.03 to 33."""


class Policy(Protocol):
    @property
    def shapes(self) -> Sequence[DecodeConfig]:
        """Every shape that ``choose`` may return, the usual one first: the engine makes room for the largest."""

    def choose(self, rows: int) -> DecodeConfig:
        """The shape of the next step, which advances so many requests."""

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        """A step's outcome: drafted tokens accepted, per request still running. ``seconds``: what the step took; None
        where other work, such as reading a prompt, ran in between."""

    def table(self) -> list[Forecast]:
        """What the choices rest on; empty if they rest on nothing learnt."""


class Fixed:
    """Always the same shape."""

    def __init__(self, config: DecodeConfig) -> None:
        self.shapes: Sequence[DecodeConfig] = (config,)

    def choose(self, rows: int) -> DecodeConfig:
        return self.shapes[0]

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        """Nothing to learn."""

    def table(self) -> list[Forecast]:
        return []


class Candidate(NamedTuple):
    config: DecodeConfig
    tokens_per_step: float
    """what the drafter reached with it when it was measured, the bonus token counted"""


class Timed(NamedTuple):
    config: DecodeConfig
    tokens_per_step: float
    step_seconds: float
    rows: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Per request."""
        return self.tokens_per_step / self.step_seconds


class Forecast(NamedTuple):
    """A line of the table that an adaptive policy decides by. ``rows``: at most so many, more than half."""

    rows: int
    config: DecodeConfig
    step_seconds: float
    tokens_per_step: float
    observed: int
    """steps that the seconds were learnt from; 0: they are an estimate from other shapes"""
    chosen: bool

    @property
    def tokens_per_second(self) -> float:
        """Per request."""
        return self.tokens_per_step / self.step_seconds


class Adaptive:
    """The shape with the most expected tokens per second, learnt step by step: plain decoding competes, so that a
    drafter that does not pay is not used, and a small share of steps tries what may have become better.

    ``timed``: every shape and ``PLAIN`` as measured for one request (``shape.py``), and some of them for more, who
    then have these alone to choose from: their steps are recorded, and another recording would keep requests waiting.
    It reads no clock and draws no random numbers: its choices follow from what it observes.
    """

    def __init__(self, timed: Sequence[Timed]) -> None:
        ranked = sorted((t for t in timed if t.rows == 1), key=lambda t: -t.tokens_per_second)
        self.shapes = tuple(t.config for t in ranked)
        self._plain = self.shapes.index(PLAIN)
        self._costs = _Costs(self.shapes, [t.step_seconds for t in ranked])
        self._timed: dict[int, set[int]] = {}
        for t in timed:
            if t.rows > 1:
                index = self.shapes.index(t.config)
                self._costs.start(t.rows, index, t.step_seconds)
                self._timed.setdefault(bucket_of(t.rows), set()).add(index)
        self._yields = _Yields(self.shapes, [t.tokens_per_step for t in ranked])
        self._current: dict[int, int] = {}
        self._steps, self._next_probe, self._pause = 0, PROBE_EVERY, PLAIN_PROBE_EVERY
        self._burst, self._probed = deque[int](), 0
        """what is tried next, and for which bucket"""
        self._before = -1
        """the shape of the last step observed"""

    def choose(self, rows: int) -> DecodeConfig:
        self._steps += 1
        bucket = bucket_of(rows)
        seconds, tokens = self._costs.of(bucket), self._yields.tokens
        if bucket not in self._current:  # how plain decoding does with so many rows is soon to be seen
            self._next_probe = min(self._next_probe, self._steps + FIRST_PROBE)
        allowed = self.offered(bucket)
        rates = [t / s * (i in allowed) for i, (t, s) in enumerate(zip(tokens, seconds, strict=True))]
        best = max(range(len(rates)), key=rates.__getitem__)
        good = best
        if best != self._plain:
            alike = [i for i, r in enumerate(rates) if r * (1 + ALIKE) >= rates[best] and i != self._plain]
            good = min(alike, key=seconds.__getitem__)
        current = self._current.get(bucket, good)
        shorter = self._plain not in (good, current) and seconds[good] < seconds[current]
        if shorter or rates[best] > rates[current] * (1 + HYSTERESIS):
            if current == self._plain:  # speculation is back: look again soon should it end again
                self._pause = PLAIN_PROBE_EVERY
            current = good
        self._current[bucket] = current
        if bucket != self._probed:  # what was to be tried may not be recorded for so many rows
            self._burst.clear()
        if not self._burst and self._steps >= self._next_probe:
            self._probed = bucket
            self._plan_probe(bucket, current, rates)
        return self.shapes[self._burst.popleft() if self._burst else current]

    def offered(self, bucket: int) -> Sequence[int]:
        """Indices of the shapes to choose from: those timed for as many rows or the next larger number."""
        if bucket > 1:
            for timed in sorted(self._timed):
                if timed >= bucket:
                    return sorted(self._timed[timed])
        return range(len(self.shapes))

    def _plan_probe(self, bucket: int, current: int, rates: list[float]) -> None:
        """Beside plain decoding: the most promising shape; more and more rarely while it fails. Beside another shape:
        what was not seen for longest."""
        others = [i for i in self.offered(bucket) if i != current]
        if current == self._plain:
            seconds, known = self._costs.of(bucket), self._yields.known
            best = max(others, key=lambda i: known[i] / seconds[i], default=current)
            hopeless = known[best] / seconds[best] < rates[current]
            self._next_probe = self._steps + self._pause
            self._pause = HOPELESS_PROBE_EVERY if hopeless else min(2 * self._pause, PLAIN_PROBE_MOST)
            # Old evidence says little about now: a few good steps in a row must be able to turn speculation on.
            self._yields.trust_at_most(RECHECK_STEPS)
            self._burst.extend([best] * PROBE_STEPS)
            return
        self._next_probe = self._steps + PROBE_EVERY
        if not self._costs.observed(bucket, self._plain):
            self._burst.extend([self._plain] * PROBE_STEPS)
            return
        close = [i for i in others if rates[i] > self._bar(bucket, i) * rates[current]]
        if close:
            oldest = min(close, key=lambda i: self._costs.last_seen(bucket, i))
            self._burst.extend([oldest] * PROBE_STEPS)

    def _bar(self, bucket: int, index: int) -> float:
        return PROBE_RATE if self._costs.observed(bucket, index) >= SURE_STEPS else UNSURE_PROBE_RATE

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        if not accepted:
            return
        index = self.shapes.index(config)
        settled, self._before = self._before == index, index
        if index != self._plain:
            self._yields.observe(index, sum(accepted) / len(accepted), len(accepted))
        if seconds is not None:
            self._costs.observe(len(accepted), index, seconds, settled)

    def table(self) -> list[Forecast]:
        """What is believed now, for every number of rows timed or met so far."""
        return [line for bucket in self._costs.buckets for line in self.forecast(bucket)]

    def forecast(self, rows: int) -> list[Forecast]:
        """The table's lines for so many rows."""
        bucket = bucket_of(rows)
        seconds, current = self._costs.of(bucket), self._current.get(bucket)
        return [
            Forecast(bucket, config, seconds[i], tokens, self._costs.observed(bucket, i), i == current)
            for i, (config, tokens) in enumerate(zip(self.shapes, self._yields.tokens, strict=True))
        ]


def bucket_of(rows: int) -> int:
    """The power of two at or above: steps of 5 to 8 requests share what they teach."""
    return 1 << max(0, rows - 1).bit_length()


class _Costs:
    """Seconds of a step by (bucket, shape): measured for one row, elsewhere measured or guessed first, then learnt."""

    def __init__(self, shapes: Sequence[DecodeConfig], seconds: Sequence[float]) -> None:
        self._nodes = [shape.tree_size for shape in shapes]
        self._one_row = list(seconds)
        self._drafting = _drafting_seconds(shapes, seconds)
        self._seconds: dict[int, list[float]] = {1: list(seconds)}
        self._observed: dict[int, list[int]] = {1: [START_WEIGHT] * len(shapes)}
        self._seen: dict[int, list[int]] = {}
        self._ran: set[tuple[int, int]] = set()
        self._time = 0

    @property
    def buckets(self) -> list[int]:
        return sorted(self._seconds)

    def start(self, rows: int, index: int, seconds: float) -> None:
        """What the shape's step took at start-up. What it takes while requests run is yet to be seen."""
        bucket = bucket_of(rows)
        self.of(bucket)[index] = seconds
        self._observed[bucket][index] = START_WEIGHT
        self._guess(bucket)

    def of(self, bucket: int) -> list[float]:
        if bucket not in self._seconds:
            self._seconds[bucket] = [0.0] * len(self._nodes)
            self._observed[bucket] = [0] * len(self._nodes)
            self._guess(bucket)
        return self._seconds[bucket]

    def _guess(self, bucket: int) -> None:
        """What was never seen: the shape's own time for one row, and as much more as so many nodes take more."""
        curve = self._curve()
        for i, nodes in enumerate(self._nodes):
            if not self._observed[bucket][i]:
                more = _at(curve, bucket * nodes) - _at(curve, nodes)
                self._seconds[bucket][i] = self._one_row[i] + more

    def _curve(self) -> list[tuple[int, float]]:
        """Seconds without drafting over nodes of all rows together, from what was seen so far, made monotone."""
        points = sorted(
            (bucket * nodes, seconds - drafting)
            for bucket, values in self._seconds.items()
            for nodes, seconds, drafting, count in zip(
                self._nodes, values, self._drafting, self._observed[bucket], strict=True
            )
            if count
        )
        curve: dict[int, float] = {}
        highest = 0.0
        for nodes, seconds in points:
            highest = curve[nodes] = max(highest, seconds)
        return list(curve.items())

    def observed(self, bucket: int, index: int) -> int:
        return self._observed[bucket][index]

    def last_seen(self, bucket: int, index: int) -> int:
        return self._seen.get(bucket, [-1] * len(self._nodes))[index]

    def observe(self, rows: int, index: int, seconds: float, settled: bool) -> None:
        """Move the shape's time towards ``seconds``; a machine that slows down slows the other shapes too.

        A step that is not ``settled``, the first after a change of shape, teaches no time: the drafter may have had
        to catch up, and what the change itself costs would be learnt as the shape's own, of all others too.
        """
        bucket = bucket_of(rows)
        values, counts = self.of(bucket), self._observed[bucket]
        self._time += 1
        self._seen.setdefault(bucket, [-1] * len(values))[index] = self._time
        if (rows, index) not in self._ran:  # the first of its kind may have compiled or recorded something
            self._ran.add((rows, index))
            return
        if not settled:
            return
        known = counts[index]
        longer, shorter = (OUTLIER, max(OUTLIER, 1 + 1 / known)) if known else (GUESS_OUTLIER, GUESS_OUTLIER)
        ratio = min(max(seconds / values[index], 1 / shorter), longer)
        counts[index] += 1
        gain = max(COST_GAIN, 1 / counts[index])
        values[index] *= ratio**gain
        others = ratio ** (COST_GAIN / 2)
        for i, count in enumerate(counts):
            if i != index and count:
                values[i] *= others
        if 0 in counts and counts[index].bit_count() == 1:  # now and then: 1, 2, 4, 8, .. times seen
            self._guess(bucket)


def _drafting_seconds(shapes: Sequence[DecodeConfig], seconds: Sequence[float]) -> list[float]:
    """The part of each shape's time that grows with its draft length, a least-squares fit of 1, nodes and length."""
    lengths = np.array([shape.draft_length if shape.speculative else 0 for shape in shapes], dtype=float)
    columns = np.stack([np.ones(len(shapes)), np.array([shape.tree_size for shape in shapes]), lengths], 1)
    slope = float(np.linalg.lstsq(columns, np.array(seconds), rcond=None)[0][2])
    most = [max(0.0, s - min(seconds)) for s in seconds]
    return [min(max(0.0, slope * n), m) for n, m in zip(lengths.tolist(), most, strict=True)]


def _at(curve: Sequence[tuple[int, float]], nodes: int) -> float:
    """The curve at so many nodes; behind its end it goes on as steeply as it went from half as many to there."""
    for (n0, s0), (n1, s1) in pairwise(curve):
        if nodes <= n1:
            return s0 + (s1 - s0) * max(0, nodes - n0) / (n1 - n0)
    last, high = curve[-1]
    before = _at(curve, last // 2) if len(curve) > 1 else 0.0
    return high + (high - before) / (last - last // 2) * max(0, nodes - last)


class _Yields:
    """Expected tokens per step of every shape, from what each once reached and what is accepted now.

    A shape that reached t tokens with drafts of length L stands for an acceptance a per depth: a + a^2 + .. + a^L =
    t - 1. Text that is harder or easier for the drafter turns every a into a^g; g is the one number learnt, such that
    the last steps' accepted tokens come out, whichever shapes they had.
    """

    def __init__(self, shapes: Sequence[DecodeConfig], tokens: Sequence[float]) -> None:
        lengths = [shape.deepest if shape.speculative else 0 for shape in shapes]
        base = [_acceptance(t - 1, length) for t, length in zip(tokens, lengths, strict=True)]
        self._grid = [
            [1 + _accepted(a**g, length) for a, length in zip(base, lengths, strict=True)]
            for g in (GRID_STEP**k for k in range(-GRID_HALF, GRID_HALF + 1))
        ]
        self._at = GRID_HALF
        self.known = self._grid[GRID_HALF]
        usual = next((i for i, length in enumerate(lengths) if length), 0)
        # What the drafter once reached counts as a few steps.
        self._weights = [0.0] * len(shapes)
        self._weights[usual] = PRIOR_STEPS
        self._accepted = PRIOR_STEPS * (self.known[usual] - 1)

    @property
    def tokens(self) -> list[float]:
        return self._grid[self._at]

    def trust_at_most(self, steps: float) -> None:
        total = sum(self._weights)
        if total > steps:
            self._keep(steps / total)

    def _keep(self, share: float) -> None:
        self._weights = [w * share for w in self._weights]
        self._accepted *= share

    def observe(self, index: int, accepted: float, rows: int) -> None:
        weight = rows**0.5
        self._keep((1 - 1 / YIELD_STEPS) ** weight)
        self._weights[index] += weight
        self._accepted += weight * accepted
        while self._at + 1 < len(self._grid) and self._expected(self._at) > self._accepted:
            self._at += 1
        while self._at > 0 and self._expected(self._at - 1) <= self._accepted:
            self._at -= 1

    def _expected(self, at: int) -> float:
        return sum(w * (t - 1) for w, t in zip(self._weights, self._grid[at], strict=True))


def _accepted(a: float, length: int) -> float:
    return sum(a**depth for depth in range(1, length + 1))


def _acceptance(accepted: float, length: int) -> float:
    """a in (0, 1) with a + .. + a^length = ``accepted``, by bisection; 0 for plain decoding."""
    if not length:
        return 0.0
    low, high = 0.0, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _accepted(middle, length) < accepted else (low, middle)
    return high
