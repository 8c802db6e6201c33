"""The array functions that the algorithm may use beside operators, slicing and ``.shape``.

A backend supplies one object with these methods (torch: ``backends/torch/ops.py``). Everything is out of place and
of static shape, so the same text runs eagerly, inside one CUDA graph, and lazily on MLX. "int" is a backend's type for
token ids, slots and their sums: int64 on torch, int32 on MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any
"""A torch.Tensor or an mlx.core.array: both have operators, slicing and ``.shape``."""


class Ops(Protocol):
    def arange(self, n: int, like: Array) -> Array:
        """[n] int 0, 1, .., on the device of ``like``."""

    def full(self, shape: Sequence[int], value: float | int | bool, like: Array) -> Array:
        """A constant: bool, int or float32 after the type of ``value``, on the device of ``like``."""

    def int32(self, x: Array) -> Array:
        """Cast to int32; arithmetic on it must wrap modulo 2**32."""

    def float32(self, x: Array) -> Array: ...

    def where(self, condition: Array, a: Array | float | int, b: Array | float | int) -> Array: ...

    def concat(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        """out[..., i, ...] = x[..., index[..., i, ...], ...]; x and index have equal rank."""

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest of the last axis, descending: values, int indices."""

    def argsort_descending(self, x: Array) -> Array:
        """Stable: equal values keep their order (parents stand before children)."""

    def argmax(self, x: Array) -> Array:
        """Index of the largest of the last axis; the lowest index on ties."""

    def amax(self, x: Array) -> Array:
        """Largest of the last axis, which is kept with length 1."""

    def sum(self, x: Array) -> Array:
        """Sum over the last axis; int for bool and int input."""

    def cumsum(self, x: Array) -> Array:
        """Running sum over the last axis."""

    def sort_descending(self, x: Array) -> Array:
        """The values of the last axis, largest first."""

    def logsumexp(self, x: Array) -> Array:
        """Over the last axis, which is kept with length 1."""

    def softmax(self, x: Array) -> Array: ...

    def log(self, x: Array) -> Array: ...

    def log1p(self, x: Array) -> Array: ...

    def one_hot(self, index: Array, size: int) -> Array:
        """bool [..., size], True where the last axis equals ``index``."""

    def count_tokens(self, index: Array, weight: Array, size: int) -> Array:
        """float32 [..., size]: for each v the sum of weight where index == v (last axes of both summed over)."""
