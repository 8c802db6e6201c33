"""Attention of tree nodes over cached keys and values: one launch whose time follows the true lengths, not the cache.

Tree nodes lie in the slots behind a row's committed ones. Node i sees every slot below ``length`` and of the tree's
slots those of its ancestor bits. The eager twin is ``attention.fast_attention`` with a mask of bools.

Flash decoding: a program takes every P-th block of slots for one tile of (node, head) rows of one KV head. The last
program of a tile to arrive merges the parts in their order: the result does not depend on who is last. In float32,
blocks and P depend on neither the number of nodes nor the lengths, so plain decoding and a tree add in the same order.

Over a short text the P programs of a large tile share its rows instead, and there is nothing to merge: layer of the
Llama-2-7B shape on one H200, 64 nodes over 300 slots, 121.2 us instead of 127.3; over 900, 127.9 instead of 129.9.

Letters: B rows, H heads, N nodes, S slots, d head width, G heads per KV head, P parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import MULTIPROCESSORS, early, start_early
from redrafter.backends.torch.kernels.tall import tall

MAX_NODES = 128
"""Bits in a node's two ancestor words."""
MANY_HEADS = 512
"""KV heads of all rows from which programs queue for the multiprocessors."""
_SPREAD_SLOTS, _SPREAD_BLOCK = tl.constexpr(1024), tl.constexpr(128)
"""Slots up to which a text is short, and those of a block then."""
_NEVER = tl.constexpr(-1.0e30)
"""Below every score, and finite: the difference of two of them is a number."""
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block(
    q, state, keys, values, slot, extent, width, length, low, high, scale, softcap,
    PADDED: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of slots added to (acc, maximum, total) of a tile; ``MASKED`` where it reaches behind the prefix."""
    acc, maximum, total = state
    column = tl.arange(0, PADDED)
    place = slot[:, None] * width + column[None, :]
    if MASKED:
        stored = (slot < extent)[:, None] & (column < D)[None, :]
        k = tl.load(keys + place, mask=stored, other=0.0)
        v = tl.load(values + place, mask=stored, other=0.0)
    elif PADDED != D:
        k = tl.load(keys + place, mask=(column < D)[None, :], other=0.0)
        v = tl.load(values + place, mask=(column < D)[None, :], other=0.0)
    else:
        k = tl.load(keys + place)
        v = tl.load(values + place)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP:
        scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
    scores = scores * _LOG2E
    if MASKED:
        node = (slot - length)[None, :]
        word = tl.where(node < 64, low[:, None], high[:, None])
        bit = ((word >> (node & 63).to(tl.int64)) & 1) != 0
        scores = tl.where((node < 0) | (bit & (slot < extent)[None, :]), scores, float("-inf"))
    largest = tl.maximum(maximum, tl.max(scores, 1))
    p = tl.exp2(scores - largest[:, None])
    shrink = tl.exp2(maximum - largest)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, largest, total * shrink + tl.sum(p, 1)


@triton.jit
def _walk(
    q, keys, values, low, high, part, most, length, extent, width, scale, softcap,
    PADDED: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """(acc, maximum, total) of a tile over every ``most``-th block of slots, from block ``part`` on."""
    state = (
        tl.zeros((BM, PADDED), tl.float32),
        tl.full((BM,), _NEVER, tl.float32),
        tl.zeros((BM,), tl.float32),
    )
    blocks = (extent + BN - 1) // BN
    first = part
    if not ONE_LOOP:
        prefix = length // BN
        for block in range(part, prefix, most):
            slot = block * BN + tl.arange(0, BN)
            state = _block(q, state, keys, values, slot, extent, width, length, low, high, scale, softcap,
                           PADDED, D, False, SOFTCAP, PRECISION)  # fmt: skip
        first += (tl.maximum(prefix - part, 0) + most - 1) // most * most
    for block in range(first, blocks, most):
        slot = block * BN + tl.arange(0, BN)
        state = _block(q, state, keys, values, slot, extent, width, length, low, high, scale, softcap,
                       PADDED, D, True, SOFTCAP, PRECISION)  # fmt: skip
    return state


@triton.jit
def _merged(entry, parts, BM: tl.constexpr, PADDED: tl.constexpr):
    """(acc, total) of a tile whose parts lie from ``entry`` on, added in their order."""
    index = tl.arange(0, BM)
    square = index[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    acc = tl.zeros((BM, PADDED), tl.float32)
    maximum = tl.full((BM,), _NEVER, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for other in range(parts):
        theirs = entry + other * (BM * (PADDED + 2))
        their_maximum = tl.load(theirs + BM * PADDED + index, cache_modifier=".cg")
        their_total = tl.load(theirs + BM * PADDED + BM + index, cache_modifier=".cg")
        largest = tl.maximum(maximum, their_maximum)
        shrink, weight = tl.exp2(maximum - largest), tl.exp2(their_maximum - largest)
        acc = acc * shrink[:, None] + tl.load(theirs + square, cache_modifier=".cg") * weight[:, None]
        total = total * shrink + their_total * weight
        maximum = largest
    return acc, total


@triton.jit
def _tile(
    query, keys, values, length, words, out, partial, arrived, first, part, most, nodes, scale, softcap,
    q_head, q_node, width, word_node, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    ONE_LOOP: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """BM (node, head) rows of one KV head from ``first`` on over one of ``most`` parts of the slots. What is given of
    queries, words and outputs begins at this text's and this KV head's."""
    r = first + tl.arange(0, BM)
    node, head = r // GROUP, r % GROUP
    low = tl.load(words + node.to(tl.int64) * word_node, mask=node < nodes, other=1)
    high = tl.load(words + node.to(tl.int64) * word_node + 1, mask=node < nodes, other=0)
    start_early(EARLY)
    extent = length + nodes
    parts = tl.minimum((extent + BN - 1) // BN, most)
    if part < parts:
        column = tl.arange(0, PADDED)
        inside = (node < nodes)[:, None] & (column < D)[None, :]
        place = head[:, None].to(tl.int64) * q_head + node[:, None].to(tl.int64) * q_node
        q = tl.load(query + place + column[None, :], mask=inside, other=0.0)
        acc, maximum, total = _walk(q, keys, values, low, high, part, most, length, extent, width, scale, softcap,
                                    PADDED, D, BM, BN, SOFTCAP, PRECISION, ONE_LOOP)  # fmt: skip
        last = True
        if MERGED and parts > 1:
            index = tl.arange(0, BM)
            mine = partial + part * (BM * (PADDED + 2))
            tl.store(mine + index[:, None] * PADDED + column[None, :], acc)
            tl.store(mine + BM * PADDED + index, maximum)
            tl.store(mine + BM * PADDED + BM + index, total)
            tl.debug_barrier()  # every thread's part lies in memory before this program says so
            last = tl.atomic_add(arrived, 1, sem="acq_rel") == parts - 1
            if last:
                acc, total = _merged(partial, parts, BM, PADDED)
                tl.store(arrived, 0)
        if last:
            to = (node[:, None] * HEADS + head[:, None]) * D + column[None, :]
            tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["nodes", "most"])  # one binary for every number of rows
def _tree_attention(
    query, keys, values, lengths, ancestors, at, out, partial, arrived, nodes, most, scale, softcap,
    q_row, q_head, q_node, kv_row, kv_head, kv_slot, length_row, word_row, word_node, at_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPREAD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    MOVED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    part, tile = tl.program_id(0), tl.program_id(1)
    row = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(2) % KV_HEADS
    # A step's lengths and ancestors are older than the launch before: they need not wait for its end.
    length = tl.load(lengths + row * length_row).to(tl.int32)
    start = (tl.load(at + row * at_row) if MOVED else row) * kv_row + kv.to(tl.int64) * kv_head
    query += row * q_row + kv.to(tl.int64) * GROUP * q_head
    words = ancestors + row * word_row
    out += (row * nodes * KV_HEADS + kv) * GROUP * D
    group = (tl.program_id(2) * tl.num_programs(1) + tile).to(tl.int64)
    if SPREAD > 0 and length + nodes <= _SPREAD_SLOTS:
        _tile(query, keys + start, values + start, length, words, out, partial, arrived,
              tile * BM + part * SPREAD, 0, 1, nodes, scale, softcap, q_head, q_node, kv_slot, word_node,
              KV_HEADS * GROUP, GROUP, D, PADDED, SPREAD, _SPREAD_BLOCK, SOFTCAP, PRECISION, EARLY, True,
              False)  # fmt: skip
    else:
        _tile(query, keys + start, values + start, length, words, out,
              partial + group * (most * BM * (PADDED + 2)), arrived + group,
              tile * BM, part, most, nodes, scale, softcap, q_head, q_node, kv_slot, word_node,
              KV_HEADS * GROUP, GROUP, D, PADDED, BM, BN, SOFTCAP, PRECISION, EARLY, BM == 16, True)  # fmt: skip


def ancestor_words(mask_BNN: Tensor) -> Tensor:
    """[B, N, 2] int64: a tree's mask as bits, N <= MAX_NODES. ``pack`` makes them itself."""
    rows, nodes, _ = mask_BNN.shape
    bits = torch.zeros(rows, nodes, MAX_NODES, dtype=torch.int64, device=mask_BNN.device)
    bits[:, :, :nodes] = mask_BNN
    place = torch.arange(64, device=mask_BNN.device)
    return (bits.view(rows, nodes, 2, 64) << place).sum(-1)


class AttentionPlan(NamedTuple):
    """How a launch is cut. In float32 nothing that decides the order of additions depends on the number of nodes."""

    tile_rows: int
    block_slots: int
    parts: int
    tiles: int
    warps: int
    stages: int
    spread: int = 0
    """rows of each of a tile's ``parts`` programs where these share its rows instead; 0: they never do"""

    def counters(self, kv_rows: int) -> int:
        """Arrival counters that ``kv_rows`` = B x KV heads need."""
        return kv_rows * self.tiles


def plan_attention(query_BHNd: Tensor, keys_BHSd: Tensor) -> AttentionPlan:
    rows, heads, nodes, width = query_BHNd.shape
    kv_heads, slots = keys_BHSd.shape[1], keys_BHSd.shape[2]
    padded = max(16, triton.next_power_of_2(width))
    block = max(16, min(128, 16384 // (padded * keys_BHSd.dtype.itemsize)))
    most = min(32, triton.next_power_of_2(triton.cdiv(slots, block)))
    texts, wanted = rows * kv_heads, nodes * (heads // kv_heads)
    exact = keys_BHSd.dtype == torch.float32  # without tensor cores larger tiles do not fit into registers
    parts = _parts(texts, most)
    # One text of SmolLM2 (3 KV heads of 64), 64 nodes over 320 slots: 7.9 us with tiles of 64 rows, 6.7 with 16. Of the
    # 7B shape (32 heads of 128), 32 nodes: 1 to 2 us less with 16 than with 32.
    small = (padded <= 64 and texts <= 8) or (parts > 1 and wanted <= 32)
    tile = 16 if exact or small else min(64, max(16, triton.next_power_of_2(wanted)))
    tiles = triton.cdiv(wanted, tile)
    if not exact:
        parts = _parts(texts * tiles, most)
    shared = not exact and padded in (64, 128) and parts > 1 and tile // parts >= 16
    # Heads of 128: where a text has one program per tile, 8 warps take 2 to 3 us of 12 less than 4, unless programs
    # queue: 12 to 28 us of a layer more. A third stage gains, but one node of one text loses 6 us.
    wide = not exact and padded == 128 and texts <= MANY_HEADS
    warps = 8 if exact or padded > 128 or (wide and parts == 1) else 4
    stages = 3 if shared or (wide and nodes > 1) else 2
    return AttentionPlan(tile, block, parts, tiles, warps, stages, tile // parts if shared else 0)


def _parts(programs: int, most: int) -> int:
    """A power of two, so that there is about one program per multiprocessor."""
    return max(1, min(most, 1 << max(0, round(math.log2(MULTIPROCESSORS / programs)))))


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths_B: Tensor,
    ancestors: Tensor,
    scale: float,
    softcap: float | None = None,
    arrived: Tensor | None = None,
    at_B: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """[B, N, H * d], contiguous, of ``query`` [B, H, N, d] over ``keys`` and ``values`` [B, Hkv, S, d], N <= MAX_NODES.

    The nodes' own keys and values are already in slots ``lengths_B`` (int64) onward. ``ancestors`` [B, N, 2] int64: bit
    j % 64 of word j // 64 says that the node sees node j. The last axis of each is dense; other strides are free, but
    keys and values share theirs. ``arrived``: int32 zeros, at least B * Hkv * tiles, that every launch leaves at zero
    (``matmul.Workspace``); launches that may overlap need their own. Without it they are made for this launch.
    ``lengths_B`` and ``ancestors`` must have been written before the launch before this one.
    ``at_B`` (int64): row b's keys and values are row ``at_B[b]`` of a whole cache, whose first rows are passed.
    """
    rows, heads, nodes, width = query.shape
    kv_heads = keys.shape[1]
    assert nodes <= MAX_NODES and heads % kv_heads == 0 and keys.stride() == values.stride()
    assert query.stride(3) == keys.stride(3) == ancestors.stride(2) == 1
    plan = plan or plan_attention(query, keys)
    padded = max(16, triton.next_power_of_2(width))
    out = tall((rows, nodes, heads * width), query)
    groups = plan.counters(rows * kv_heads)
    partial = torch.empty(
        groups * plan.parts * plan.tile_rows * (padded + 2) if plan.parts > 1 else 1,
        dtype=torch.float32,
        device=query.device,
    )
    if arrived is None or len(arrived) < groups:
        arrived = torch.zeros(groups, dtype=torch.int32, device=query.device)
    exact = query.dtype == torch.float32
    _tree_attention[(plan.parts, plan.tiles, rows * kv_heads)](
        query, keys, values, lengths_B, ancestors, lengths_B if at_B is None else at_B, out, partial, arrived,
        nodes, plan.parts, scale, softcap or 0.0,
        query.stride(0), query.stride(1), query.stride(2), keys.stride(0), keys.stride(1), keys.stride(2),
        lengths_B.stride(0), ancestors.stride(0), ancestors.stride(1), 0 if at_B is None else at_B.stride(0),
        kv_heads, heads // kv_heads, width, padded, plan.tile_rows, plan.block_slots,
        plan.spread, softcap is not None, "ieee" if exact else "tf32", at_B is not None,
        num_warps=plan.warps, num_stages=plan.stages, **early(out),
    )  # fmt: skip
    return out
