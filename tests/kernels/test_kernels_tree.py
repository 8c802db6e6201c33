"""Pack, choose and accept against the algorithm's text, on random pools, trees and choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redrafter.algorithm import accept as eager
from redrafter.algorithm.beam import DraftBeams
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.tree import TokenTree
from redrafter.algorithm.tree import pack as eager_pack
from redrafter.params import DecodeConfig
from tests.kernels.twins import OPS, random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.accept import Sampled, accept, choose_tiles
from redrafter.backends.torch.kernels.beam import levels
from redrafter.backends.torch.kernels.pack import pack

V = 12


def random_beams(rows: int, shape: DecodeConfig, seed: int, step: float = 0.0) -> DraftBeams:
    """A pool as beam search fills it: children below their parents, distinct tokens per parent. With ``step`` scores
    lie on a grid, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, depths, scores = [], [], [], []
    slot, above = torch.full((rows, 1), -1), torch.zeros(rows, 1)
    for level in levels(shape, V):
        drop = torch.rand(rows, level.beams, level.children, generator=generator).sort(2).values * 3
        score = above[:, :, None] - (drop if step == 0 else (drop / step).floor() * step)
        order = torch.rand(rows, level.beams, V, generator=generator).argsort(2)[:, :, : level.children]
        tokens.append(order.flatten(1))
        parents.append(slot[:, :, None].expand_as(order).flatten(1))
        depths.append(torch.full_like(tokens[-1], level.depth))
        scores.append(score.flatten(1))
        above, best = OPS.top_k(scores[-1], level.width)
        slot = best + level.offset
    pool = (torch.cat(part, 1) for part in (tokens, parents, depths, scores))
    return DraftBeams(*pool, slot, shape.draft_length)


def to(device: torch.device, value):
    """A NamedTuple of tensors on ``device``."""
    return type(value)(*(x.to(device) if isinstance(x, Tensor) else x for x in value))


SHAPES = [
    (DecodeConfig(beam_width=w, branching=k, draft_length=d, tree_size=n), step)
    for w, k, d, n, step in (
        (1, 1, 1, 2, 0.0),
        (1, 2, 3, 5, 0.0),
        (2, 1, 4, 64, 0.0),
        (3, 2, 2, 7, 1.0),
        (4, 4, 5, 33, 0.0),
        (4, 3, 6, 64, 0.5),
        (8, 8, 8, 64, 0.0),
        (8, 8, 8, 128, 1.0),
        (5, 7, 9, 100, 0.25),
    )
]


@pytest.mark.parametrize(("shape", "step"), SHAPES, ids=str)
def test_pack_is_the_algorithms(shape: DecodeConfig, step: float, device: torch.device) -> None:
    for rows in (1, 3):
        beams = to(device, random_beams(rows, shape, seed=rows + shape.tree_size, step=step))
        root = torch.arange(rows, device=device) + 40
        expected = eager_pack(OPS, beams, root, shape.tree_size)
        tree, ancestors = pack(beams, root, shape.tree_size)
        for name, got, want in list(zip(tree._fields, tree, expected, strict=True))[:5]:
            assert got.dtype == want.dtype and torch.equal(got, want), name
        bit = torch.arange(tree.tokens.shape[1], device=device)
        seen = (ancestors[:, :, bit // 64] >> (bit % 64)) & 1
        assert torch.equal(seen == 1, expected.mask)


def test_pack_marks_dead_slots_and_takes_minus_infinity(device: torch.device) -> None:
    beams = random_beams(2, DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=30), seed=1)
    score = beams.score.clone()
    score[0, 4:] = -1.0e30
    score[1, 5:] = -torch.inf
    beams = to(device, beams._replace(score=score))
    root = torch.tensor([1, 2], device=device)
    expected = eager_pack(OPS, beams, root, 15)
    tree, _ = pack(beams, root, 15)
    assert torch.equal(tree.live, expected.live) and not bool(expected.live.all())
    assert torch.equal(tree.parent, expected.parent) and torch.equal(tree.mask, expected.mask)


def random_tree(rows: int, shape: DecodeConfig, seed: int) -> TokenTree:
    return eager_pack(OPS, random_beams(rows, shape, seed), torch.arange(rows), shape.tree_size)


def agreeing_choice(tree: TokenTree, seed: int, agree: float) -> Tensor:
    """[B, N] tokens: at most nodes a random child's token, so that long paths are accepted."""
    generator = torch.Generator().manual_seed(seed)
    rows, nodes = tree.tokens.shape
    choice = torch.randint(V, (rows, nodes), generator=generator)
    for b in range(rows):
        for n in range(1, nodes):
            if float(torch.rand(1, generator=generator)) < agree:
                choice[b, tree.parent[b, n]] = tree.tokens[b, n]
    return choice


@pytest.mark.parametrize(("shape", "_"), SHAPES, ids=str)
def test_accept_is_the_algorithms(shape: DecodeConfig, _: float, device: torch.device) -> None:
    depths = shape.draft_length + 1
    longest = 0
    for seed in range(3):
        tree = random_tree(4, shape, seed)
        live = torch.rand(tree.live.shape, generator=torch.Generator().manual_seed(seed)) < 0.97
        tree = tree._replace(live=live | (tree.depth == 0))
        finite = torch.rand(tree.live.shape, generator=torch.Generator().manual_seed(seed + 9)) < 0.9
        choice = to(device, eager.Choice(agreeing_choice(tree, seed, 0.6), finite))
        tree = to(device, tree)
        expected = eager.accept(OPS, tree, choice, depths)
        got = accept(tree, choice, depths)
        for name, left, right in list(zip(got._fields, got, expected, strict=True))[:5]:
            assert left.dtype == right.dtype and torch.equal(left, right), name
        longest = max(longest, int(expected.length.max()))
    assert longest >= min(2, shape.draft_length)


def test_accept_of_the_root_alone(device: torch.device) -> None:
    root = torch.tensor([[3], [4]], device=device)
    one = torch.ones(2, 1, 1, dtype=torch.bool, device=device)
    tree = TokenTree(root, root * 0, root * 0, one, one[:, 0])
    choice = eager.Choice(root + 5, torch.tensor([[True], [False]], device=device))
    got, expected = accept(tree, choice, 1), eager.accept(OPS, tree, choice, 1)
    assert all(torch.equal(left, right) for left, right in zip(got[:5], expected[:5], strict=True))


def choose(logits: Tensor, depth: Tensor, sampled: Sampled | None = None) -> Tensor:
    """[B, N] tokens: the index in the largest key."""
    return 0x7FFFFFFF - (choose_tiles(logits, depth, sampled).amax(2) & 0x7FFFFFFF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 1024, 2500])
def test_choose_is_the_algorithms(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = DecodeConfig(beam_width=3, branching=2, draft_length=3, tree_size=9)
    tree = to(device, random_tree(3, shape, seed=2))
    logits = random(3, 9, vocabulary, seed=vocabulary, scale=2).to(device, dtype)
    noise = random(3, 4, vocabulary, seed=3).to(device)
    greedy = eager.choose(OPS, logits.float(), tree, Sampling(), None)
    assert torch.equal(choose(logits, tree.depth), greedy.token)
    inverse = torch.tensor([1.7, 0.0, 0.6], device=device)
    mixed = eager.choose(OPS, logits.float(), tree, Sampling(inverse_temperature=inverse), noise)
    got = choose(logits, tree.depth, Sampled(noise, inverse))
    assert torch.equal(got, mixed.token)
    assert torch.equal(got[1], greedy.token[1]) and not torch.equal(got[0], greedy.token[0])


def not_finite(device: torch.device) -> Tensor:
    """[6, 1, V] logits, of which rows 0 and 4 are fit to choose."""
    logits = random(6, 1, 2500, seed=5).round().to(device)
    logits[1, 0, 2400] = torch.nan
    logits[2, 0, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, 0, 9:] = -torch.inf
    logits[5] = -3.2e38
    return logits


def test_choose_takes_the_lowest_index_and_nan_first(device: torch.device) -> None:
    logits = not_finite(device)
    got = choose(logits, torch.zeros(6, 1, dtype=torch.int64, device=device))
    best = logits.amax(2, keepdim=True)
    first = torch.where(best.isnan(), logits.isnan(), logits == best).float().argmax(2)
    assert torch.equal(got, first)


def test_accept_says_what_is_not_finite(device: torch.device) -> None:
    zero = torch.zeros(6, 1, dtype=torch.int64, device=device)
    one = torch.ones(6, 1, 1, dtype=torch.bool, device=device)
    got = accept(TokenTree(zero, zero, zero, one, one[:, 0]), choose_tiles(not_finite(device), zero), 1)
    assert got.finite.tolist() == [True, False, False, False, True, False]


def test_accept_of_keys_is_accept_of_the_choice(device: torch.device) -> None:
    shape = DecodeConfig(beam_width=8, branching=4, draft_length=5, tree_size=64)
    tree = random_tree(3, shape, seed=6)
    logits = random(3, 64, 2100, seed=1)
    agreed = agreeing_choice(tree, 2, 0.7)
    logits.scatter_(2, agreed[:, :, None], 9.0)
    tree, logits = to(device, tree), logits.to(device)
    expected = eager.choose_accept(OPS, logits, tree, Sampling(), None, 6)
    got = accept(tree, choose_tiles(logits, tree.depth), 6)
    assert all(torch.equal(left, right) for left, right in zip(got[:5], expected[:5], strict=True))
    assert int(got.length.max()) >= 2
