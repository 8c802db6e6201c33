"""The tiles of a level, merged, are log-softmax and top-k of the whole row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.twins import OPS, random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.beam import Level, Winners, beam_level, new_pool
from redrafter.backends.torch.kernels.topk import Coupling, tile_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def children_of(
    logits: Tensor, children: int, ids: Tensor | None = None, coupling: Coupling | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and tokens [B, W, K] that a level writes for beams of score 0."""
    rows, beams, _ = logits.shape
    level = Level(depth=2, offset=0, beams=beams, children=children, width=1)
    zeros = torch.zeros(rows, beams, dtype=torch.int64, device=logits.device)
    pool = new_pool(rows, beams * children, logits.device)
    arrived = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    beam_level(logits, level, pool, Winners(zeros, zeros, zeros, zeros.float(), zeros), arrived, ids, coupling)
    assert not arrived.any()
    shape = (rows, beams, children)
    return pool.score.view(shape), pool.tokens.view(shape)


def check(logits: Tensor, children: int, exact: Tensor | None = None) -> None:
    exact = logits.float() if exact is None else exact
    value, index = OPS.top_k(exact, children)
    expected = value - OPS.logsumexp(exact)
    score, token = children_of(logits, children)
    assert torch.equal(token, index)
    # No child is above its parent's 0, NaN included.
    torch.testing.assert_close(score, torch.where(expected <= 0, expected, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [3, 1024, 1025, 5000])
@pytest.mark.parametrize("children", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rows(vocabulary: int, children: int, dtype: torch.dtype, device: torch.device) -> None:
    check(random(2, 3, vocabulary, seed=vocabulary, scale=3).to(device, dtype), min(children, vocabulary))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index_across_tiles(dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.zeros(1, 2, 3000, device=device)
    logits[0, 1] = random(3000, seed=1).round().to(device)
    logits[0, 0, 5] = -0.0  # equal to zero
    check(logits.to(dtype), 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(dtype: torch.dtype, device: torch.device) -> None:
    logits = random(1, 6, 2100, seed=4).to(device)
    logits[0, 0, 2000] = torch.nan
    logits[0, 1, 7] = torch.inf
    logits[0, 2, 5:] = -torch.inf
    logits[0, 3] = -torch.inf
    logits[0, 4] = torch.nan
    logits[0, 5, 3:1500] = -torch.nan
    logits = logits.to(dtype)
    exact = torch.where(logits.isnan(), torch.nan, logits.float())
    # torch's sort and the kernel agree that NaN is the largest; what it leaves open is only the order among NaN.
    check(logits, 6, exact)


def test_rows_need_not_be_dense(device: torch.device) -> None:
    wide = random(2, 2, 1400, seed=6).to(device)
    check(wide.flatten(0, 1)[:, :1300].unflatten(0, (2, 2)), 5)


@pytest.mark.parametrize("reduced", [False, True])
def test_coupling_is_the_algorithms(reduced: bool, device: torch.device) -> None:
    logits, noise = random(3, 2, 1500, seed=7).to(device), random(3, 4, 2000, seed=8).to(device)[:, 2]
    inverse = torch.tensor([0.0, 1.3, 0.7], device=device)
    ids = torch.randperm(2000, generator=torch.Generator().manual_seed(1))[:1500].to(device) if reduced else None
    seen = noise[:, :1500] if ids is None else noise[:, ids]
    factor = inverse[:, None, None]
    coupled = torch.where(factor > 0, logits * factor + seen[:, None, :], logits)
    score, token = children_of(logits, 4, ids, Coupling(noise, inverse))
    expected, index = children_of(coupled, 4)
    assert torch.equal(token, index if ids is None else ids[index])
    assert torch.equal(score, expected)


def test_tiles_stay_few() -> None:
    for vocabulary in (1, 1000, 32_000, 49_152, 128_256, 151_936):
        assert -(-vocabulary // tile_size(vocabulary)) <= 38
