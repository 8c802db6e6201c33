"""One level of the beam search in one launch: scan the vocabulary's tiles (``topk.py``), and whoever is last of a row's
programs merges them, scores children, writes the pool, picks beams. Who that is decides nothing: it reads all tiles'
results in their order.

The eager twin is the body of the loop in ``algorithm/beam.draft``. B rows, W beams, P pool slots, V draft vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.beam import DEAD
from redrafter.algorithm.lookup import Chain
from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.topk import (
    NO_KEY,
    Coupling,
    block_for,
    key_index,
    key_value,
    order_key,
    safe_maximum,
    scan,
)
from redrafter.params import DecodeConfig


class Level(NamedTuple):
    """The fixed geometry of one depth of the pool."""

    depth: int  # 1 for children of the root
    offset: int  # first pool slot
    beams: int  # beams that have children here
    children: int  # children per beam
    width: int  # beams that go on


class LookedUp(NamedTuple):
    chain: Chain
    """contiguous"""
    tail: int
    """of the last level: how far the chain goes on below it; the pool ends with as many slots"""


class Pool(NamedTuple):
    """The arrays of ``algorithm.beam.DraftBeams``, filled level by level."""

    tokens: Tensor  # [B, P] int64
    parent: Tensor  # [B, P] int64
    depth: Tensor  # [B, P] int64
    score: Tensor  # [B, P] float32


class Winners(NamedTuple):
    """The beams that go on, best first; of equal scores the lower pool slot."""

    beam: Tensor  # [B, W] int64 the beam of this level that each one continues
    token: Tensor  # [B, W] int64 target token id
    slot: Tensor  # [B, W] int64 pool slot
    score: Tensor  # [B, W] float32
    follows: Tensor  # [B, W] int64, 1 where the beam has followed what was looked up


def levels(shape: DecodeConfig, vocabulary: int) -> Iterator[Level]:
    """Every depth's geometry, as ``algorithm/beam.draft`` lays the pool out."""
    beams, offset = 1, 0
    for depth in range(1, shape.draft_length + 1):
        children = min(max(shape.branching, shape.beam_width) if depth == 1 else shape.branching, vocabulary)
        width = min(shape.beam_width, beams * children)
        yield Level(depth, offset, beams, children, width)
        beams, offset = width, offset + beams * children


def new_pool(rows: int, slots: int, device: torch.device) -> Pool:
    tokens, parent, depth = (torch.empty(rows, slots, dtype=torch.int64, device=device) for _ in range(3))
    return Pool(tokens, parent, depth, torch.empty(rows, slots, dtype=torch.float32, device=device))


def _no_winners(rows: int, width: int, device: torch.device) -> Winners:
    beam, token, slot, follows = (torch.empty(rows, width, dtype=torch.int64, device=device) for _ in range(4))
    return Winners(beam, token, slot, torch.empty(rows, width, dtype=torch.float32, device=device), follows)


@triton.jit
def _best(
    keys, log_sum_exp, source, is_beam, tiles, CHILDREN: tl.constexpr, BEAMS_P: tl.constexpr, CHILDREN_P: tl.constexpr,
    TILES_P: tl.constexpr, CANDIDATES_P: tl.constexpr,
):  # fmt: skip
    """Every beam's best keys of all tiles [BEAMS_P, CHILDREN_P], and its log-sum-exp [BEAMS_P, 1]."""
    tile = tl.arange(0, TILES_P)[None, :]
    # Past the first cache, which does not see what other multiprocessors have just written.
    read = is_beam & (tile < tiles)
    part = tl.load(log_sum_exp + source * tiles + tile, mask=read, other=float("-inf"), cache_modifier=".cg")
    maximum = safe_maximum(tl.max(part, axis=1))[:, None]
    total = tl.sum(tl.exp(part - maximum), axis=1)[:, None]
    log_total = tl.log(total) + maximum

    candidates = tiles * CHILDREN
    candidate = tl.arange(0, CANDIDATES_P)[None, :]
    read = is_beam & (candidate < candidates)
    key = tl.load(keys + source * candidates + candidate, mask=read, other=NO_KEY, cache_modifier=".cg")
    child = tl.arange(0, CHILDREN_P)[None, :]
    best = tl.full([BEAMS_P, CHILDREN_P], NO_KEY, tl.int64)
    for i in range(CHILDREN):
        top = tl.max(key, axis=1)[:, None]
        best = tl.where(child == i, top, best)
        key = tl.where(key == top, NO_KEY, key)
    return best, log_total


@triton.jit
def _mixed(token, weight, guess, share, uses, exists, last):
    """``algorithm.lookup.mixed`` of one row: children's tokens [BEAMS_P, CHILDREN_P] and weights with what was looked
    up in them, and which are that."""
    hit = (token == guess) & exists & uses
    of_chain = tl.log(share)
    own = weight + tl.log(1.0 - share)
    missing = uses & (tl.max(hit.to(tl.int32), axis=1)[:, None] == 0) & last & (of_chain > own)
    hit = hit | missing
    own = tl.where(missing, float("-inf"), own)
    chains = tl.where(hit, of_chain, float("-inf"))
    largest = safe_maximum(tl.maximum(own, chains))
    both = tl.log(tl.exp(own - largest) + tl.exp(chains - largest)) + largest
    return tl.where(missing, guess, token), tl.where(uses, both, weight), hit


@triton.jit
def _tail(
    row, chain_token, chain_share, chain_row, pool_token, pool_parent, pool_depth, pool_score, pool, offset, depth,
    hit, score, place, CHILDREN: tl.constexpr, TAIL: tl.constexpr, TAIL_P: tl.constexpr, DEAD: tl.constexpr,
):  # fmt: skip
    """``algorithm.beam._tail``: below the one of all CHILDREN that follows the chain, the rest of it."""
    found = tl.max(tl.max(hit.to(tl.int32), axis=1), axis=0)
    start = tl.sum(tl.sum(tl.where(hit, score, 0.0), axis=1), axis=0)
    above = tl.sum(tl.sum(tl.where(hit, offset + place, 0), axis=1), axis=0)
    above = tl.where(found > 0, above, offset)
    behind = tl.arange(0, TAIL_P)
    rest = behind < TAIL
    source = row * chain_row + depth + behind
    logs = tl.log(tl.load(chain_share + source, mask=rest, other=1.0))
    total = tl.where(found + 0 * behind > 0, start + tl.cumsum(logs, axis=0), DEAD)
    parent = tl.where(behind == 0, above, offset + CHILDREN - 1 + behind)
    slot = row * pool + offset + CHILDREN + behind
    tl.store(pool_token + slot, tl.load(chain_token + source, mask=rest, other=0), mask=rest)
    tl.store(pool_parent + slot, parent.to(tl.int64), mask=rest)
    tl.store(pool_depth + slot, (depth + 1 + behind).to(tl.int64), mask=rest)
    tl.store(pool_score + slot, total, mask=rest)


@triton.jit
def _merge(
    row, keys, log_sum_exp, token_ids, parent_slot, parent_score, parent_follows, chain_token, chain_share, chain_row,
    pool_token, pool_parent, pool_depth, pool_score,
    out_beam, out_token, out_slot, out_score, out_follows, pool, offset, depth, tiles,
    BEAMS: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr, BEAMS_P: tl.constexpr, CHILDREN_P: tl.constexpr,
    TILES_P: tl.constexpr, CANDIDATES_P: tl.constexpr, REDUCED: tl.constexpr, ROOT: tl.constexpr, CHAIN: tl.constexpr,
    TAIL: tl.constexpr, TAIL_P: tl.constexpr, DEAD: tl.constexpr,
):  # fmt: skip
    """Of one row: from the tiles' best keys and sums to the pool and the winners."""
    beam = tl.arange(0, BEAMS_P)[:, None]
    source = row * BEAMS + beam  # [BEAMS_P, 1]
    is_beam = beam < BEAMS

    best, log_total = _best(
        keys, log_sum_exp, source, is_beam, tiles, CHILDREN, BEAMS_P, CHILDREN_P, TILES_P, CANDIDATES_P
    )  # fmt: skip
    child = tl.arange(0, CHILDREN_P)[None, :]
    exists = is_beam & (child < CHILDREN)
    above = tl.zeros([BEAMS_P, 1], tl.float32)
    slot_above = tl.full([BEAMS_P, CHILDREN_P], -1, tl.int64)
    if not ROOT:
        above += tl.load(parent_score + source, mask=is_beam, other=0.0)
        slot_above += tl.load(parent_slot + source, mask=is_beam, other=0) + 1
    token = key_index(best)
    if REDUCED:
        token = tl.load(token_ids + token, mask=exists, other=0)
    weight = key_value(best) - log_total
    if CHAIN:
        follows = is_beam
        if not ROOT:
            follows = tl.load(parent_follows + source, mask=is_beam, other=0) != 0
        place = row * chain_row + depth - 1
        share = tl.load(chain_share + place) + tl.zeros([BEAMS_P, 1], tl.float32)
        token, weight, hit = _mixed(
            token, weight, tl.load(chain_token + place), share, follows & (share > 0), exists, child == CHILDREN - 1
        )
    # Neither rounding nor NaN may lift a child over its parent (algorithm/beam.py).
    score = weight + above
    score = tl.where(score <= above, score, above)
    place = beam * CHILDREN + child
    at = row * pool + offset + place
    tl.store(pool_token + at, token, mask=exists)
    tl.store(pool_parent + at, slot_above, mask=exists)
    tl.store(pool_depth + at, tl.zeros([BEAMS_P, CHILDREN_P], tl.int64) + depth, mask=exists)
    tl.store(pool_score + at, score, mask=exists)
    if TAIL > 0:
        _tail(
            row, chain_token, chain_share, chain_row, pool_token, pool_parent, pool_depth, pool_score,
            pool, offset, depth, hit, score, place, BEAMS * CHILDREN, TAIL, TAIL_P, DEAD,
        )  # fmt: skip

    # A child's rank is the number of better ones; keys are distinct, so the ranks below WIDTH are the winners in order.
    rival = tl.reshape(tl.where(exists, order_key(score, place), NO_KEY), [BEAMS_P * CHILDREN_P])
    better = (rival[:, None] > rival[None, :]).to(tl.int32)
    rank = tl.reshape(tl.sum(better, axis=0), [BEAMS_P, CHILDREN_P])
    wins = exists & (rank < WIDTH)
    to = row * WIDTH + rank
    tl.store(out_beam + to, (beam + tl.zeros([BEAMS_P, CHILDREN_P], tl.int32)).to(tl.int64), mask=wins)
    tl.store(out_token + to, token, mask=wins)
    tl.store(out_slot + to, (offset + place).to(tl.int64), mask=wins)
    tl.store(out_score + to, score, mask=wins)
    if CHAIN:
        tl.store(out_follows + to, hit.to(tl.int64), mask=wins)


@triton.jit(do_not_specialize=["offset", "depth"])  # one binary for all depths of one geometry
def _beam_level(
    logits, noise, inverse_temperature, token_ids, keys, log_sum_exp, vocabulary, row_stride, noise_stride, arrived,
    parent_slot, parent_score, parent_follows, chain_token, chain_share, chain_row,
    pool_token, pool_parent, pool_depth, pool_score,
    out_beam, out_token, out_slot, out_score, out_follows, pool, offset, depth, tiles,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, COUPLED: tl.constexpr,
    BEAMS: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr, BEAMS_P: tl.constexpr, CHILDREN_P: tl.constexpr,
    TILES_P: tl.constexpr, CANDIDATES_P: tl.constexpr, REDUCED: tl.constexpr, ROOT: tl.constexpr, CHAIN: tl.constexpr,
    TAIL: tl.constexpr, TAIL_P: tl.constexpr, DEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_early(EARLY)
    beam = tl.program_id(0).to(tl.int64)
    scan(
        beam, tl.program_id(1), logits, noise, inverse_temperature, token_ids, keys, log_sum_exp,
        vocabulary, row_stride, noise_stride, BEAMS, tiles, CHILDREN, PADDED, BLOCK, COUPLED, REDUCED,
    )  # fmt: skip
    row = beam // BEAMS
    tl.debug_barrier()  # every thread's results lie in memory before this program says so
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == BEAMS * tiles - 1:
        tl.store(arrived + row, 0)
        _merge(
            row, keys, log_sum_exp, token_ids, parent_slot, parent_score, parent_follows, chain_token, chain_share,
            chain_row, pool_token, pool_parent, pool_depth, pool_score,
            out_beam, out_token, out_slot, out_score, out_follows, pool, offset, depth, tiles,
            BEAMS, CHILDREN, WIDTH, BEAMS_P, CHILDREN_P, TILES_P, CANDIDATES_P, REDUCED, ROOT, CHAIN,
            TAIL, TAIL_P, DEAD,
        )  # fmt: skip


def beam_level(
    logits_BWV: Tensor,
    level: Level,
    pool: Pool,
    before: Winners | None,
    arrived_B: Tensor,
    token_ids: Tensor | None = None,
    coupling: Coupling | None = None,
    looked_up: LookedUp | None = None,
) -> Winners:
    """Fill ``pool`` at ``level`` and pick the beams that go on. ``before``: this level's beams, None at the root.
    ``arrived_B`` int32: zeros, and zeros again afterwards."""
    rows, beams, vocabulary = logits_BWV.shape
    chain, tail = looked_up or (None, 0)
    logits_RV = logits_BWV.reshape(rows * beams, vocabulary)
    assert logits_RV.stride(1) == 1 and beams == level.beams and len(arrived_B) == rows
    block = block_for(vocabulary, level.children)
    tiles = triton.cdiv(vocabulary, block)
    keys = torch.empty(rows * beams, tiles, level.children, dtype=torch.int64, device=logits_RV.device)
    log_sum_exp = torch.empty(rows * beams, tiles, dtype=torch.float32, device=logits_RV.device)
    noise, inverse = (log_sum_exp, log_sum_exp) if coupling is None else coupling
    out = _no_winners(rows, level.width, logits_RV.device)
    padded = triton.next_power_of_2(level.children)
    beams_p, candidates_p = (triton.next_power_of_2(n) for n in (beams, tiles * level.children))
    _beam_level[(rows * beams, tiles)](
        logits_RV, noise, inverse, keys if token_ids is None else token_ids, keys, log_sum_exp,
        vocabulary, logits_RV.stride(0), noise.stride(0), arrived_B,
        *((pool.parent, pool.score, out.follows) if before is None else (before.slot, before.score, before.follows)),
        *((out.follows, out.score, 0) if chain is None else (*chain, chain.tokens.shape[1])), *pool, *out,
        pool.score.shape[1], level.offset, level.depth, tiles,
        PADDED=padded, BLOCK=block, COUPLED=coupling is not None,
        BEAMS=beams, CHILDREN=level.children, WIDTH=level.width, BEAMS_P=beams_p, CHILDREN_P=padded,
        TILES_P=triton.next_power_of_2(tiles), CANDIDATES_P=candidates_p,
        REDUCED=token_ids is not None, ROOT=before is None, CHAIN=chain is not None,
        TAIL=tail, TAIL_P=triton.next_power_of_2(max(tail, 1)), DEAD=DEAD,
        num_warps=max(block // 512, 8 if beams_p * candidates_p > 2048 else 1), **early(keys),
        enable_fp_fusion=False,  # x * inverse + gumbel rounds twice, as in the algorithm
    )  # fmt: skip
    return out
