"""A whole step as one function of arrays, written down once per kind of step and replayed by ``mx.compile``.

Writing a step's thousand operations down in Python takes longer than a GPU needs to compute them for a small model.
The compiled function is keyed by what is not an array in it; MLX itself keeps a version per set of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from redrafter.backends.mlx.kv_cache import KVCache


class _Leaf:
    """Where an array stands in a layout."""


LEAF = _Leaf()


def flatten(value: Any, leaves: list[mx.array]) -> Any:
    """Append the arrays of nested named tuples to ``leaves``; what is left is hashable and can be put back."""
    if isinstance(value, mx.array):
        leaves.append(value)
        return LEAF
    if isinstance(value, tuple):
        return type(value), tuple(flatten(part, leaves) for part in value)
    return value


def unflatten(layout: Any, leaves: Iterator[mx.array]) -> Any:
    if layout is LEAF:
        return next(leaves)
    if isinstance(layout, tuple):
        kind, parts = layout
        values = [unflatten(part, leaves) for part in parts]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    return layout


class Steps:
    """Calls ``function(state, config)``, whose arrays are those of ``state`` and of the caches.

    ``compiled``: by ``mx.compile``, else as it is. Either way the results are under way when a call returns.
    """

    def __init__(self, function: Callable[[Any, Any], Any], compiled: bool) -> None:
        self.compiled = compiled
        self.start: Callable[..., Any] = mx.async_eval
        self._function = function
        self._known: dict[Any, tuple[Any, list[Any]]] = {}

    def __len__(self) -> int:
        """Functions compiled so far."""
        return len(self._known)

    def clear(self) -> None:
        self._known.clear()

    def __call__(self, state: Any, config: Any, caches: Sequence[KVCache], limits: tuple[int, ...]) -> Any:
        """``limits``: slots that attention looks at in each cache."""
        leaves: list[mx.array] = []
        layout = flatten(state, leaves)
        if self.compiled:
            key = (config, limits, layout, len(caches))
            if key not in self._known:
                told: list[Any] = []
                function = self._pure(layout, config, caches, limits, told)
                self._known[key] = mx.compile(function), told
            run, told = self._known[key]
        else:
            told = []
            run = self._pure(layout, config, caches, limits, told)
        # Nobody else may hold the old arrays when the new ones are computed: MLX then writes them in place.
        results, arrays = run(leaves, [cache.arrays for cache in caches])
        for cache, new in zip(caches, arrays, strict=True):
            cache.arrays = new
        self.start(results, arrays)
        return unflatten(told[0], iter(results))

    def _pure(
        self, layout: Any, config: Any, caches: Sequence[KVCache], limits: tuple[int, ...], told: list[Any]
    ) -> Callable[[list[mx.array], list[list[mx.array]]], tuple[list[mx.array], list[list[mx.array]]]]:
        """(arrays of the state, of the caches) -> (arrays of the results, of the caches); the results' layout goes to
        ``told``. The caches are only borrowed while the function runs."""

        def pure(leaves: list[mx.array], stored: list[list[mx.array]]) -> tuple[list[mx.array], list[list[mx.array]]]:
            before = [cache.arrays for cache in caches]
            for cache, arrays, limit in zip(caches, stored, limits, strict=True):
                # A write into an array changes the name it is reached by: the caller's stay as they are.
                cache.arrays, cache.limit = [array[...] for array in arrays], limit
            try:
                results: list[mx.array] = []
                told[:] = [flatten(self._function(unflatten(layout, iter(leaves)), config), results)]
                return results, [cache.arrays for cache in caches]
            finally:
                for cache, arrays in zip(caches, before, strict=True):
                    cache.arrays, cache.limit = arrays, None

        return pure
