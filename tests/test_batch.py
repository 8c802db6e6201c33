"""Readings of different widths beside and after one another, against lists of pairs."""

from __future__ import annotations

import random

import pytest
import torch

from redrafter.algorithm.beam import Reading
from redrafter.backends.torch.ops import TorchOps
from redrafter.batch import append, last_pair, pad

OPS = TorchOps()
Pairs = list[tuple[float, int]]


def reading(rows: list[Pairs], first: list[int], width: int) -> Reading:
    """Past its last pair a row repeats it."""
    full = [[*pairs, *[pairs[-1]] * (width - len(pairs))] for pairs in rows]
    features = torch.tensor([[[f, -f] for f, _ in pairs] for pairs in full])
    tokens = torch.tensor([[t for _, t in pairs] for pairs in full])
    return Reading(features, tokens, torch.tensor(first), torch.tensor([len(pairs) for pairs in rows]))


def random_rows(rng: random.Random, rows: int, longest: int) -> list[Pairs]:
    return [[(rng.random(), rng.randrange(90)) for _ in range(rng.randint(1, longest))] for _ in range(rows)]


def assert_same(a: Reading, b: Reading) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_pairs_that_follow_pairs_lie_without_gaps(seed: int) -> None:
    rng = random.Random(seed)
    rows, wide, narrow = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 3)
    old, new = random_rows(rng, rows, wide), random_rows(rng, rows, narrow)
    first = [rng.randrange(50) for _ in range(rows)]
    after = [f + len(pairs) for f, pairs in zip(first, old, strict=True)]
    both = append(OPS, reading(old, first, wide), reading(new, after, narrow))
    expected = [a + b for a, b in zip(old, new, strict=True)]
    assert_same(both, reading(expected, first, wide + narrow))
    last = [f + len(pairs) - 1 for f, pairs in zip(first, expected, strict=True)]
    assert_same(last_pair(OPS, both), reading([pairs[-1:] for pairs in expected], last, 1))
    assert_same(pad(OPS, both, wide + narrow + 3), reading(expected, first, wide + narrow + 3))
    assert pad(OPS, both, wide) is both
