"""What a step of each beam shape costs on this machine, measured once at start-up for one request.

How many tokens a step yields depends on the texts and was measured when the drafter was trained; their ratio ranks the
shapes, and plain decoding with them. From there on the policy learns (``policy.Adaptive``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from redrafter.engine import Backend, first_state
from redrafter.params import PLAIN, DecodeConfig
from redrafter.policy import Candidate, Timed

PROBE_TOKENS = 192
"""Cached tokens while timing: a question and half an answer."""


def time_shapes(backend: Backend, candidates: Sequence[Candidate], repeats: int = 3) -> list[Timed]:
    """Plain decoding and every candidate with their measured step time.

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
    return [Timed(*c, statistics.median(t[1:])) for c, t in zip(all_candidates, seconds, strict=True)]


def _one_step(backend: Backend, config: DecodeConfig, length: int) -> float:
    """Seconds of one greedy step behind ``length`` cached tokens; what they are does not matter to the time."""
    state = first_state(backend, config, backend.prefill(0, []), root=1, length=length)
    backend.synchronize()
    started = time.perf_counter()
    _, accepted, tree = backend.step(state, config)
    backend.read(backend.fetch(accepted, tree))
    return time.perf_counter() - started
