"""The control for forks: plain decoding by steps of the speculative shape, which accept nothing that was drafted.

In a 16-bit type one row and N rows are multiplied by kernels that round differently, so that a near-tie may fork. The
control has the N rows and nothing else of speculation: a step drafts and verifies its tree as always and goes on from
the target's own choice after the root. How often it differs from plain decoding is what N rows alone do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redrafter.algorithm.accept import Accepted
from redrafter.params import DecodeConfig
from redrafter.policy import Policy

if TYPE_CHECKING:
    from redrafter.backends.base import BaseBackend
    from redrafter.llm import LLM


def root_alone(choose_accept: Callable[..., Accepted]) -> Callable[..., Accepted]:
    """The stage of a step that accepts, with all nodes but the root named dead: its length is 0, its tokens are the
    target's choice after the root. The target has verified the whole tree by then, and nothing is committed yet."""

    def cut(ops: Any, logits: Any, tree: Any, *rest: Any) -> Accepted:
        return choose_accept(ops, logits, tree._replace(live=tree.live & (tree.depth == 0)), *rest)

    return cut


@contextmanager
def accepting_nothing(backend: BaseBackend) -> Iterator[None]:
    """Every step inside accepts the root alone. Only while no request runs."""
    before = backend.stages
    with backend.recorded_anew():
        backend.stages = before._replace(choose_accept=root_alone(before.choose_accept))
        try:
            yield
        finally:
            backend.stages = before


def usual_shape(policy: Policy) -> DecodeConfig | None:
    """The speculative shape that most steps were learnt from, else the first one; None if there is none."""
    shapes = [shape for shape in policy.shapes if shape.speculative]
    seen: Counter[DecodeConfig] = Counter()
    for line in policy.table():
        seen[line.config] += line.observed
    return max(shapes, key=lambda shape: seen[shape], default=None)


def with_shape(llm: LLM, shape: DecodeConfig) -> LLM:
    """The same model and caches with one shape for every step, and no prompt taken from the cache."""
    from redrafter.engine import Engine
    from redrafter.llm import LLM

    engine = Engine(llm.engine.backend, shape, llm.engine.max_batch, prefix_reuse=False)
    return LLM(engine, llm.tokenizer, model=llm.model, drafter=llm.drafter)
