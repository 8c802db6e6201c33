"""One level of the beam search in one kernel: merge the vocabulary's tiles, score children, write the pool, pick beams.

The eager twin is the body of the loop in ``algorithm/beam.draft``. B rows, W beams, P pool slots.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.topk import NO_KEY, TileTops, key_index, key_value, order_key, safe_maximum
from redrafter.params import DecodeConfig


class Level(NamedTuple):
    """The fixed geometry of one depth of the pool."""

    depth: int  # 1 for children of the root
    offset: int  # first pool slot
    beams: int  # beams that have children here
    children: int  # children per beam
    width: int  # beams that go on


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


@triton.jit(do_not_specialize=["offset", "depth"])  # one binary for all depths of one geometry
def _beam_level(
    keys,
    log_sum_exp,
    token_ids,
    parent_slot,
    parent_score,
    pool_token,
    pool_parent,
    pool_depth,
    pool_score,
    out_beam,
    out_token,
    out_slot,
    out_score,
    pool,
    offset,
    depth,
    tiles,
    BEAMS: tl.constexpr,
    CHILDREN: tl.constexpr,
    WIDTH: tl.constexpr,
    BEAMS_P: tl.constexpr,
    CHILDREN_P: tl.constexpr,
    TILES_P: tl.constexpr,
    CANDIDATES_P: tl.constexpr,
    REDUCED: tl.constexpr,
    ROOT: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, BEAMS_P)[:, None]
    source = row * BEAMS + beam  # [BEAMS_P, 1]
    is_beam = beam < BEAMS

    tile = tl.arange(0, TILES_P)[None, :]
    part = tl.load(log_sum_exp + source * tiles + tile, mask=is_beam & (tile < tiles), other=float("-inf"))
    maximum = safe_maximum(tl.max(part, axis=1))[:, None]
    total = tl.sum(tl.exp(part - maximum), axis=1)[:, None]
    log_total = tl.log(total) + maximum

    candidates = tiles * CHILDREN
    candidate = tl.arange(0, CANDIDATES_P)[None, :]
    key = tl.load(keys + source * candidates + candidate, mask=is_beam & (candidate < candidates), other=NO_KEY)
    child = tl.arange(0, CHILDREN_P)[None, :]
    best = tl.full([BEAMS_P, CHILDREN_P], NO_KEY, tl.int64)
    for i in range(CHILDREN):
        top = tl.max(key, axis=1)[:, None]
        best = tl.where(child == i, top, best)
        key = tl.where(key == top, NO_KEY, key)

    exists = is_beam & (child < CHILDREN)
    above = tl.zeros([BEAMS_P, 1], tl.float32)
    slot_above = tl.full([BEAMS_P, CHILDREN_P], -1, tl.int64)
    if not ROOT:
        above += tl.load(parent_score + source, mask=is_beam, other=0.0)
        slot_above += tl.load(parent_slot + source, mask=is_beam, other=0) + 1
    score = key_value(best) - log_total + above
    # Neither rounding nor NaN may lift a child over its parent (algorithm/beam.py).
    score = tl.where(score <= above, score, above)
    token = key_index(best)
    if REDUCED:
        token = tl.load(token_ids + token, mask=exists, other=0)
    place = beam * CHILDREN + child
    at = row * pool + offset + place
    tl.store(pool_token + at, token, mask=exists)
    tl.store(pool_parent + at, slot_above, mask=exists)
    tl.store(pool_depth + at, tl.zeros([BEAMS_P, CHILDREN_P], tl.int64) + depth, mask=exists)
    tl.store(pool_score + at, score, mask=exists)

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


def beam_level(
    tops: TileTops, level: Level, pool: Pool, before: Winners | None, token_ids: Tensor | None = None
) -> Winners:
    """Fill ``pool`` at ``level`` and pick the beams that go on. ``before``: this level's beams, None at the root."""
    rows = pool.score.shape[0]
    tiles = tops.keys.shape[1]
    device = pool.score.device
    beam, token, slot = (torch.empty(rows, level.width, dtype=torch.int64, device=device) for _ in range(3))
    out = Winners(beam, token, slot, torch.empty(rows, level.width, dtype=torch.float32, device=device))
    beams_p, candidates_p = (triton.next_power_of_2(n) for n in (level.beams, tiles * level.children))
    _beam_level[(rows,)](
        tops.keys,
        tops.log_sum_exp,
        tops.keys if token_ids is None else token_ids,
        *((pool.parent, pool.score) if before is None else (before.slot, before.score)),
        *pool,
        *out,
        pool.score.shape[1],
        level.offset,
        level.depth,
        tiles,
        BEAMS=level.beams,
        CHILDREN=level.children,
        WIDTH=level.width,
        BEAMS_P=beams_p,
        CHILDREN_P=triton.next_power_of_2(level.children),
        TILES_P=triton.next_power_of_2(tiles),
        CANDIDATES_P=candidates_p,
        REDUCED=token_ids is not None,
        ROOT=before is None,
        num_warps=8 if beams_p * candidates_p < 8192 else 16,  # so that the keys stay in registers
        **early(beam),
    )
    return out
