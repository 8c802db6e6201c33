"""What a step of each beam shape costs on this machine, measured once at start-up.

How many tokens a step yields depends on the texts and was measured when the drafter was trained; their ratio ranks the
shapes, and plain decoding with them. From there on the policy learns (``policy.Adaptive``). One request is enough for
that, except where a step is recorded before it can be replayed: a recording takes as long as a hundred steps, and what
is needed first is recorded here, before anybody waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from redrafter.batch import take_rows
from redrafter.engine import Backend, Engine, SamplingHistory, first_state
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.policy import Adaptive, Candidate, Fixed, Forecast, Timed, bucket_of

PROBE_TOKENS = 192
"""Cached tokens while timing: a question and half an answer."""
TIMED_STEPS = 4
"""Steps in a row that a time is taken of where the device has a queue of its own: as they follow each other while
requests run, each launched before the outcome of the one before is read. Alone, a step of a small model takes half as
long again, plain ones more than others, and the shapes come in the wrong order."""
FEWEST = 4
"""The first number of rows beyond one that is timed."""
PROMISING = 3
"""Shapes to choose from beside plain decoding for more than one row: two thirds of them the best, the others the best
on text of which half as much is accepted. Twice as many are timed, picked by what is known from fewer rows."""


def adaptive(backend: Backend, candidates: Sequence[Candidate], max_batch: int = 1) -> Adaptive:
    """A policy over these shapes on this machine."""
    timed = time_shapes(backend, candidates, max_batch)
    policy = Adaptive(timed)
    if backend.graphs is not None:
        record_ahead(backend, policy, max_batch)
        change_shapes(backend, policy.shapes)
    return policy


def time_shapes(backend: Backend, candidates: Sequence[Candidate], max_batch: int = 1, repeats: int = 3) -> list[Timed]:
    """Plain decoding and every candidate with their measured step time; where steps are recorded, the most promising
    of them for more rows too, up to ``max_batch``."""
    everything = [Candidate(PLAIN, 1.0), *candidates]
    steps = 1 + _steps_at_once(backend)
    largest = max(c.config.tree_size + steps * (c.config.deepest + 1) for c in everything)
    tokens = min(PROBE_TOKENS, backend.context_limit - 1)
    rows_to_time = _rows_to_time(max_batch if backend.graphs is not None else 1)
    backend.reserve(rows_to_time[-1], tokens + largest)
    timed = _time(backend, everything, tokens, 1, repeats)
    for rows in rows_to_time[1:]:
        tried = _promising(Adaptive(timed).forecast(rows), 2 * PROMISING)
        found = _time(backend, [c for c in everything if c.config in (PLAIN, *tried)], tokens, rows, repeats)
        kept = _promising(found, PROMISING)
        timed += [t for t in found if t.config in (PLAIN, *kept)]
    return timed


def _promising(lines: Sequence[Forecast | Timed], count: int) -> list[DecodeConfig]:
    lines = sorted((x for x in lines if x.config.speculative), key=lambda x: -x.tokens_per_second)
    best, rest = lines[: 2 * count // 3], lines[2 * count // 3 :]
    rest.sort(key=lambda x: -(1 + x.tokens_per_step) / x.step_seconds)
    return [x.config for x in (*best, *rest[: count - len(best)])]


def record_ahead(backend: Backend, policy: Adaptive, max_batch: int) -> None:
    """Take every step that the policy may choose once, greedy and sampled: no request waits for a recording."""
    tokens = min(PROBE_TOKENS, backend.context_limit - 1)
    for rows in _recorded_rows(max_batch):
        for index in policy.offered(bucket_of(rows)):
            for temperature in (0.0, 1.0):
                _step_seconds(backend, policy.shapes[index], tokens, rows, temperature)


def change_shapes(backend: Backend, shapes: Sequence[DecodeConfig]) -> None:
    """A request that goes from the first shape to each other one and back. What the drafter catches up with where it
    reads less at once is loaded when it is first used, which took 20 ms of a step on one H200."""
    turns = [shape for other in shapes[1:] for shape in (shapes[0], other)]
    engine = Engine(backend, _InTurn(turns), 1, prefix_reuse=False)
    engine.add("start", [1], SamplingParams(max_new_tokens=backend.context_limit, ignore_eos=True))
    for _ in turns:
        engine.step()
    engine.cancel_all()
    backend.synchronize()


class _InTurn(Fixed):
    def __init__(self, turns: Sequence[DecodeConfig]) -> None:
        self.shapes = tuple(turns)
        self._next = iter(turns)

    def choose(self, rows: int) -> DecodeConfig:
        return next(self._next)


def _recorded_rows(most: int) -> list[int]:
    """1, 2, 3, 5, 7, 9, 13, ..: for each of the sizes 1, 2, 4, 6, 8, 12, .. that steps are recorded for the fewest rows
    that it serves (``backends.torch.graph.size_for``)."""
    sizes = {m << k for m in (1, 2, 3) for k in range(most.bit_length())} - {3}
    return [1, *(n + 1 for n in sorted(sizes) if n < most)]


def _rows_to_time(most: int) -> list[int]:
    """1, 4, 8, 16, .. and ``most`` itself: what a policy tells apart (``policy.bucket_of``), but for two rows."""
    powers = [FEWEST << k for k in range(most.bit_length()) if FEWEST << k < most]
    return [1, *powers, *([most] if most > 1 else [])]


def _time(backend: Backend, shapes: Sequence[Candidate], tokens: int, rows: int, repeats: int) -> list[Timed]:
    """Interleaved, so that a machine that slows down slows all of them; the median of ``repeats`` times counts."""
    seconds: list[list[float]] = [[] for _ in shapes]
    for _ in range(repeats + 1):  # the first round warms up, compiles, records
        for times, shape in zip(seconds, shapes, strict=True):
            times.append(_step_seconds(backend, shape.config, tokens, rows, steps=_steps_at_once(backend)))
    return [Timed(*c, statistics.median(t[1:]), rows) for c, t in zip(shapes, seconds, strict=True)]


def _steps_at_once(backend: Backend) -> int:
    return 1 + TIMED_STEPS if backend.run_ahead else 1


def _step_seconds(
    backend: Backend, config: DecodeConfig, length: int, rows: int, temperature: float = 0.0, steps: int = 1
) -> float:
    """Seconds of one step of ``rows`` requests of ``length`` cached tokens; what they are does not matter to the
    time. Of several in a row the first does not count."""
    state = first_state(backend, config, backend.prefill(0, []), root=1, length=length)
    if rows > 1:
        state = take_rows(state, backend.array([0] * rows))
    request = SamplingHistory(SamplingParams(temperature=temperature), [1], [])
    state = state._replace(sampling=backend.sampling([request] * rows))
    if backend.graphs is not None:  # a graph's own state, as it is while requests run
        state = backend.step(state, config)[0]
    backend.synchronize()
    started, flights = time.perf_counter(), deque[Any]()
    for left in reversed(range(steps)):
        state, accepted, tree = backend.step(state, config)
        flights.append(backend.fetch(accepted, tree))
        while len(flights) > min(left, 1):
            backend.read(flights.popleft())
        if steps - left == 2:
            started = time.perf_counter()  # the first step's outcome was read just now
    return (time.perf_counter() - started) / max(1, steps - 1)
