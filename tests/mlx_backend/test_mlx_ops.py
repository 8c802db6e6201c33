"""The array functions on MLX give what they give on torch; the noise is the same to the bit."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")

import torch

from redrafter.algorithm.beam import DraftBeams
from redrafter.algorithm.noise import gumbel, key_of, random_bits
from redrafter.algorithm.tree import pack
from redrafter.backends.mlx.ops import CHUNK, MLXOps
from redrafter.backends.torch.ops import TorchOps

OURS, THEIRS = MLXOps(), TorchOps()
RNG = np.random.default_rng(0)
TIED = RNG.integers(-3, 3, (2, 3, 40)).astype(np.float32)
WHOLE = RNG.integers(-(2**40), 2**40, (2, 3, 40))
INDEX = RNG.integers(0, 3, (2, 3, 40))
CALLS = {
    "arange": lambda o, a: o.arange(5, a(TIED)),
    "full bool": lambda o, a: o.full((2, 1), True, a(TIED)),
    "full int": lambda o, a: o.full((2, 1), -1, a(TIED)),
    "full float": lambda o, a: o.full((2, 1), 0.5, a(TIED)),
    "int32": lambda o, a: o.int32(a(WHOLE)),
    "int32 product": lambda o, a: o.int32(a(WHOLE)) * 0x7FEB352D,
    "int32 negative product": lambda o, a: o.int32(a(WHOLE)) * -2073254261,
    "int32 shift": lambda o, a: (o.int32(a(WHOLE)) >> 15) & 0x1FFFF,
    "float32": lambda o, a: o.float32(a(WHOLE)),
    "where": lambda o, a: o.where(a(TIED) > 0, a(INDEX), 7),
    "where float": lambda o, a: o.where(a(TIED) > 0, float("-inf"), a(TIED)),
    "concat": lambda o, a: o.concat([a(INDEX), a(INDEX)], 1),
    "stack": lambda o, a: o.stack([a(TIED), a(TIED)], 2),
    "take_along": lambda o, a: o.take_along(a(INDEX), a(INDEX), 1),
    "argsort_descending": lambda o, a: o.argsort_descending(a(TIED)),
    "argsort_descending int": lambda o, a: o.argsort_descending(a(INDEX)),
    "argmax": lambda o, a: o.argmax(a(TIED)),
    "amax": lambda o, a: o.amax(a(TIED)),
    "sum": lambda o, a: o.sum(a(TIED)),
    "sum bool": lambda o, a: o.sum(a(TIED) > 0),
    "sum int": lambda o, a: o.sum(a(INDEX)),
    "cumsum": lambda o, a: o.cumsum(a(TIED)),
    "sort_descending": lambda o, a: o.sort_descending(a(TIED)),
    "logsumexp": lambda o, a: o.logsumexp(a(TIED)),
    "softmax": lambda o, a: o.softmax(a(TIED)),
    "log": lambda o, a: o.log(a(np.abs(TIED) + 1)),
    "log1p": lambda o, a: o.log1p(a(np.abs(TIED))),
    "one_hot": lambda o, a: o.one_hot(a(INDEX), 3),
    "count_tokens": lambda o, a: o.count_tokens(a(INDEX[:, 0]), a(np.abs(TIED)), 3),
}


def to_mlx(values: np.ndarray) -> mx.array:
    """Whole numbers as the backend has them, int32, where they fit."""
    whole = values.dtype == np.int64 and np.abs(values).max() < 2**31
    return mx.array(values.astype(np.int32) if whole else values)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_gives_torch_s_values_shape_and_type(name: str) -> None:
    ours, theirs = CALLS[name](OURS, to_mlx), CALLS[name](THEIRS, torch.from_numpy)
    kind = str(theirs.dtype).rpartition(".")[2].replace("int64", "int32")  # MLX's integers are int32 throughout
    assert str(ours.dtype).rpartition(".")[2].rstrip("_") == kind
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6, atol=1e-6)
    if not mx.issubdtype(ours.dtype, mx.floating):
        assert np.array_equal(np.array(ours), theirs.numpy())


@pytest.mark.parametrize("size", [5, CHUNK, 4 * CHUNK + 3, 40 * CHUNK, 41 * CHUNK - 1])
@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("tied", [False, True])
def test_top_k_is_the_head_of_a_stable_sort(size: int, k: int, tied: bool) -> None:
    rng = np.random.default_rng(size + k)
    x = rng.integers(0, 4, (3, 2, size)) if tied else rng.standard_normal((3, 2, size))
    x = x.astype(np.float32)
    k = min(k, size)
    values, index = OURS.top_k(mx.array(x), k)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    assert index.dtype == mx.int32
    assert np.array_equal(np.array(index), expected)
    assert np.array_equal(np.array(values), np.take_along_axis(x, expected, -1))


def test_a_long_stable_sort_and_the_lowest_argmax() -> None:
    x = np.random.default_rng(1).integers(0, 5, (2, 9000)).astype(np.float32)
    assert np.array_equal(np.array(OURS.argsort_descending(mx.array(x))), np.argsort(-x, axis=-1, kind="stable"))
    assert OURS.argmax(mx.array(x)).tolist() == np.argmax(x, axis=-1).tolist()


@pytest.mark.parametrize("seed", [0, 11, 2**63 + 5])
def test_noise_is_the_same_stream(seed: int) -> None:
    keys = np.array([key_of(seed), key_of(seed, 3)], dtype=np.int64)
    positions = np.array([[0, 1, 2**20], [5, 77, 2**33]])
    tokens = np.arange(2000)
    ours = random_bits(OURS, mx.array(keys), mx.array(positions), mx.array(tokens))
    theirs = random_bits(THEIRS, *map(torch.from_numpy, (keys, positions, tokens)))
    assert ours.dtype == mx.int32 and np.array_equal(np.array(ours), theirs.numpy())
    ours = gumbel(OURS, mx.array(keys), mx.array(positions), mx.array(tokens))
    theirs = gumbel(THEIRS, *map(torch.from_numpy, (keys, positions, tokens)))
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_the_same_tree_from_the_same_pool() -> None:
    """Ties in the pool: the sort must be stable for parents to stand first."""
    rng = np.random.default_rng(2)
    rows, pool = 3, 30
    parent = np.array([[-1 if i < 4 else int(rng.integers(0, i)) for i in range(pool)] for _ in range(rows)])
    depth, score = np.zeros((rows, pool), np.int64), np.zeros((rows, pool), np.float32)
    for row in range(rows):
        for i, up in enumerate(parent[row]):
            depth[row, i] = 1 if up < 0 else depth[row, up] + 1
            score[row, i] = (0 if up < 0 else score[row, up]) - rng.integers(0, 2)
    tokens = rng.integers(0, 50, (rows, pool))
    root, final = np.array([1, 2, 3]), parent[:, :4]
    length = int(depth.max())
    ours = pack(OURS, DraftBeams(*map(mx.array, (tokens, parent, depth, score, final)), length), mx.array(root), 12)
    arrays = map(torch.from_numpy, (tokens, parent, depth, score, final))
    theirs = pack(THEIRS, DraftBeams(*arrays, length), torch.from_numpy(root), 12)
    assert ours.ancestors is theirs.ancestors is None
    for mine, other in zip(ours[:5], theirs[:5], strict=True):
        assert np.array_equal(np.array(mine), other.numpy())
