"""Which beam shape to decode with: the drafter's known tokens per step over the step times of this machine.

How many tokens a step yields depends on the texts and was measured when the drafter was trained; what a step costs
depends on the machine and is measured here, once, at start-up. Their ratio picks the shape; plain decoding competes
under the same rule, so a drafter that does not pay is not used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from redrafter.engine import Backend, first_state
from redrafter.params import PLAIN, DecodeConfig

PROBE_TOKENS = 192
"""Cached tokens while timing: a question and half an answer."""


class Candidate(NamedTuple):
    config: DecodeConfig
    tokens_per_step: float


class Timed(NamedTuple):
    config: DecodeConfig
    tokens_per_step: float
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds


def pick_shape(backend: Backend, candidates: Sequence[Candidate], repeats: int = 3) -> list[Timed]:
    """Every candidate and plain decoding with their measured step time, the fastest first.

    Interleaved, so that a machine that slows down slows all of them; the median of ``repeats`` steps counts.
    """
    all_candidates = [Candidate(PLAIN, 1.0), *candidates]
    largest = max(c.config.tree_size + c.config.draft_length for c in all_candidates)
    tokens = min(PROBE_TOKENS, backend.context_limit - 1)
    backend.reserve(1, tokens + largest + 1)
    seconds: list[list[float]] = [[] for _ in all_candidates]
    for _ in range(repeats + 1):  # the first round warms up
        for times, candidate in zip(seconds, all_candidates, strict=True):
            times.append(_one_step(backend, candidate.config, tokens))
    timed = [Timed(*c, statistics.median(t[1:])) for c, t in zip(all_candidates, seconds, strict=True)]
    return sorted(timed, key=lambda t: -t.tokens_per_second)


def _one_step(backend: Backend, config: DecodeConfig, length: int) -> float:
    """Seconds of one greedy step behind ``length`` cached tokens; what they are does not matter to the time."""
    state = first_state(backend, config, backend.prefill(0, []), root=1, length=length)
    backend.synchronize()
    started = time.perf_counter()
    _, accepted, _ = backend.step(state, config)
    backend.host(accepted.tokens)
    return time.perf_counter() - started
