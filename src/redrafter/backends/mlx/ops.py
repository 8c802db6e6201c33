"""The algorithm's array functions on MLX arrays (see ``algorithm/ops.py`` for what each promises).

Integers are int32 where torch's are int64: token ids, slots and their sums fit, MLX's own indices are 32 bits wide
(``view`` renames them for nothing, a cast would be a launch), and CUDA compiles what gathers and scatters once per
type. ``like`` names a device in torch; MLX arrays have none, the default device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

_DTYPE = {bool: mx.bool_, int: mx.int32, float: mx.float32}
CHUNK = 128
"""Scores per chunk of a long axis in ``top_k``."""


@lru_cache(maxsize=1024)
def counting(n: int, width: int = 0) -> mx.array:
    """[n] int32: 0, 1, 2 .., or so in rows of ``width``. Computed once: in a compiled step it is a constant and no
    launch."""
    numbers = mx.arange(n, dtype=mx.int32)
    if width:
        numbers = numbers.reshape(-1, width)
    mx.eval(numbers)
    return numbers


@lru_cache(maxsize=1024)
def constant(shape: tuple[int, ...], value: float | int | bool, dtype: mx.Dtype) -> mx.array:
    """The same of one value everywhere."""
    filled = mx.full(shape, value, dtype=dtype)
    mx.eval(filled)
    return filled


def ascending(x: mx.array) -> mx.array:
    """The order of the last axis, smallest first, int32. Stable."""
    return mx.argsort(x, axis=-1).view(mx.int32)


class MLXOps:
    def arange(self, n: int, like: mx.array) -> mx.array:
        return counting(n)

    def full(self, shape: Sequence[int], value: float | int | bool, like: mx.array) -> mx.array:
        return constant(tuple(shape), value, _DTYPE[type(value)])

    def int32(self, x: mx.array) -> mx.array:
        return x.astype(mx.int32)

    def float32(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32)

    def where(self, condition: mx.array, a: mx.array | float | int, b: mx.array | float | int) -> mx.array:
        return mx.where(condition, a, b)

    def concat(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.concatenate(list(arrays), axis=axis)

    def stack(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.stack(list(arrays), axis=axis)

    def take_along(self, x: mx.array, index: mx.array, axis: int) -> mx.array:
        return mx.take_along_axis(x, index, axis=axis)

    def top_k(self, x: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """Equal values by rising index. A long axis is searched in two stages, since a sort of a whole vocabulary for
        every beam costs more than the drafter: the k largest lie in the k chunks whose largest are largest."""
        # Of the negated scores the smallest are sought: MLX sorts upwards, and one negation serves every stage.
        chunks, low = x.shape[-1] // CHUNK, -x
        if chunks < 4 * k:
            index = ascending(low)[..., :k]
            return mx.take_along_axis(x, index, axis=-1), index
        rest = -x.shape[-1] % CHUNK
        if rest:
            low = mx.concatenate([low, constant((*x.shape[:-1], rest), mx.inf, x.dtype)], axis=-1)
        parts = low.reshape(*x.shape[:-1], -1, CHUNK)
        best = mx.sort(ascending(parts.min(axis=-1))[..., :k], axis=-1)
        index = counting(parts.shape[-2] * CHUNK, CHUNK)[best].reshape(*x.shape[:-1], k * CHUNK)
        candidates = mx.take_along_axis(parts, best[..., None], axis=-2).reshape(*x.shape[:-1], k * CHUNK)
        order = ascending(candidates)[..., :k]
        return -mx.take_along_axis(candidates, order, axis=-1), mx.take_along_axis(index, order, axis=-1)

    def argsort_descending(self, x: mx.array) -> mx.array:
        return ascending(-x)

    def argmax(self, x: mx.array) -> mx.array:
        return mx.argmax(x, axis=-1).view(mx.int32)

    def amax(self, x: mx.array) -> mx.array:
        return mx.max(x, axis=-1, keepdims=True)

    def sum(self, x: mx.array) -> mx.array:
        return mx.sum(x, axis=-1)

    def cumsum(self, x: mx.array) -> mx.array:
        return mx.cumsum(x, axis=-1)

    def sort_descending(self, x: mx.array) -> mx.array:
        return -mx.sort(-x, axis=-1)

    def logsumexp(self, x: mx.array) -> mx.array:
        return mx.logsumexp(x, axis=-1, keepdims=True)

    def softmax(self, x: mx.array) -> mx.array:
        return mx.softmax(x, axis=-1, precise=True)

    def log(self, x: mx.array) -> mx.array:
        return mx.log(x)

    def log1p(self, x: mx.array) -> mx.array:
        return mx.log1p(x)

    def one_hot(self, index: mx.array, size: int) -> mx.array:
        return index[..., None] == counting(size)

    def count_tokens(self, index: mx.array, weight: mx.array, size: int) -> mx.array:
        rows, nodes, _ = weight.shape
        out = mx.zeros((rows, nodes, size), dtype=mx.float32)
        row, node = mx.arange(rows)[:, None, None], mx.arange(nodes)[None, :, None]
        return out.at[row, node, index[:, None, :]].add(weight)
