"""The parts of a speculative step on MLX as functions of their own, for mlx_steps.py and mlx_launches.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from redrafter.algorithm.accept import choose_accept
from redrafter.algorithm.beam import draft
from redrafter.algorithm.step import DecodeState, Stages, advance, step, step_noise
from redrafter.algorithm.tree import pack
from redrafter.backends.mlx.compiled import Steps, flatten
from redrafter.backends.mlx.kv_cache import KVCache
from redrafter.params import DecodeConfig


class Phase(NamedTuple):
    name: str
    arrays: Any
    """what it reads beside the caches, as nested tuples"""
    function: Callable[[Any, DecodeConfig], Any]
    caches: list[KVCache]


def phases(backend: Any, state: DecodeState, config: DecodeConfig) -> list[Phase]:
    """The parts in their order. A whole step is done once, for what each part is given."""
    seen: dict[str, Any] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen[name] = function(*args)
            return seen[name]

        return call

    ops, target, drafter = backend.ops, backend.target, backend.drafter
    verify = watched("verify", target.verify)

    class Watched:
        vocab_size = target.vocab_size
        commit = target.commit

    Watched.verify = staticmethod(verify)  # type: ignore[attr-defined]
    choosing = watched("choose_accept", choose_accept)
    stages = Stages(step_noise, watched("draft", draft), watched("pack", pack), choosing, advance)
    step(ops, Watched(), drafter, state, config, stages)
    mx.eval([cache.arrays for cache in (target.cache, drafter.cache) if cache is not None])
    leaves: list[mx.array] = []
    flatten(tuple(seen.values()), leaves)
    mx.eval(leaves)
    beams, tree, accepted = seen["draft"], seen["pack"], seen["choose_accept"]
    logits, features = seen["verify"]
    depths = config.draft_length + 1

    def finish(arrays: Any, _: DecodeConfig) -> Any:
        state, features, accepted, tree = arrays
        packed = super(type(backend), backend).fetch(accepted, tree)
        return advance(ops, state, features, accepted), packed

    own, mine = [target.cache], [] if drafter.cache is None else [drafter.cache]
    read = state.reading
    return [
        Phase("context", (read,), lambda a, _: drafter.begin(a[0])[:2], mine),
        Phase("draft", (read, state.root), lambda a, c: draft(ops, drafter, *a, c, None), mine),
        Phase("pack", (beams, state.root), lambda a, c: pack(ops, *a, c.tree_size), []),
        Phase("verify", (tree, state.lengths), lambda a, _: target.verify(*a), own),
        Phase(
            "accept",
            (logits, tree, state.sampling),
            lambda a, _: choose_accept(ops, a[0], a[1], a[2], None, depths),
            [],
        ),
        Phase("commit", (state.lengths, accepted), lambda a, _: target.commit(*a), own),
        Phase("finish", (state, features, accepted, tree), finish, []),
    ]


def run(phase: Phase, steps: Steps, config: DecodeConfig, slots: int) -> Any:
    """Start it once; ``slots``: how many the attention looks at."""
    return steps(phase.arrays, config, phase.caches, (slots,) * len(phase.caches))
