"""Attention of tree nodes over cached keys and values: one launch whose time follows the true lengths, not the cache.

Tree nodes lie in the slots behind a row's committed ones. Node i sees every slot below ``length`` and of the tree's
slots those of its ancestor bits. The eager twin is ``attention.fast_attention`` with a mask of bools.

Flash decoding: a program takes every P-th block of slots for one tile of (node, head) rows of one KV head. Blocks and
P depend on neither the number of nodes nor the lengths, so plain decoding and a tree add in the same order. The
last program of a tile to arrive merges the parts in their order: the result does not depend on who is last.

Letters: B rows, H heads, N nodes, S slots, d head width, G heads per KV head, P parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.tall import tall

MAX_NODES = 128
"""Bits in a node's two ancestor words."""
MANY_HEADS = 512
"""KV heads of all rows from which programs queue for the multiprocessors."""
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


@triton.jit(do_not_specialize=["nodes", "most"])  # one binary for every number of rows
def _tree_attention(
    query, keys, values, lengths, ancestors, at, out, partial, arrived, nodes, most, scale, softcap,
    q_row, q_head, q_node, kv_row, kv_head, kv_slot, length_row, word_row, word_node, at_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    MOVED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    part, tile = tl.program_id(0), tl.program_id(1)
    row = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(2) % KV_HEADS
    r = tile * BM + tl.arange(0, BM)
    node = r // GROUP
    alive = node < nodes
    # A step's lengths and ancestors are older than the launch before: they need not wait for its end.
    length = tl.load(lengths + row * length_row).to(tl.int32)
    words = ancestors + row * word_row + node.to(tl.int64) * word_node
    low = tl.load(words, mask=alive, other=1)
    high = tl.load(words + 1, mask=alive, other=0)
    start_early(EARLY)
    extent = length + nodes
    blocks = (extent + BN - 1) // BN
    parts = tl.minimum(blocks, most)
    if part < parts:
        column = tl.arange(0, PADDED)
        head = kv * GROUP + r % GROUP
        inside = alive[:, None] & (column < D)[None, :]
        place = row * q_row + head[:, None].to(tl.int64) * q_head + node[:, None].to(tl.int64) * q_node
        q = tl.load(query + place + column[None, :], mask=inside, other=0.0)
        start = (tl.load(at + row * at_row) if MOVED else row) * kv_row + kv.to(tl.int64) * kv_head
        k, v = keys + start, values + start

        state = (
            tl.zeros((BM, PADDED), tl.float32),
            tl.full((BM,), _NEVER, tl.float32),
            tl.zeros((BM,), tl.float32),
        )
        prefix = length // BN
        for block in range(part, prefix, most):
            slot = block * BN + tl.arange(0, BN)
            state = _block(q, state, k, v, slot, extent, kv_slot, length, low, high, scale, softcap,
                           PADDED, D, False, SOFTCAP, PRECISION)  # fmt: skip
        done = (tl.maximum(prefix - part, 0) + most - 1) // most
        for block in range(part + done * most, blocks, most):
            slot = block * BN + tl.arange(0, BN)
            state = _block(q, state, k, v, slot, extent, kv_slot, length, low, high, scale, softcap,
                           PADDED, D, True, SOFTCAP, PRECISION)  # fmt: skip
        acc, maximum, total = state

        last = True
        if parts > 1:
            group = (tl.program_id(2) * tl.num_programs(1) + tile).to(tl.int64)
            entry = partial + group * (most * BM * (PADDED + 2))
            index = tl.arange(0, BM)
            square = index[:, None] * PADDED + column[None, :]
            mine = entry + part * (BM * (PADDED + 2))
            tl.store(mine + square, acc)
            tl.store(mine + BM * PADDED + index, maximum)
            tl.store(mine + BM * PADDED + BM + index, total)
            tl.debug_barrier()  # every thread's part lies in memory before this program says so
            last = tl.atomic_add(arrived + group, 1, sem="acq_rel") == parts - 1
            if last:
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
                tl.store(arrived + group, 0)
        if last:
            to = ((row * nodes + node)[:, None] * (KV_HEADS * GROUP) + head[:, None]) * D + column[None, :]
            tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def ancestor_words(mask_BNN: Tensor) -> Tensor:
    """[B, N, 2] int64: a tree's mask as bits, N <= MAX_NODES. ``pack`` makes them itself."""
    rows, nodes, _ = mask_BNN.shape
    bits = torch.zeros(rows, nodes, MAX_NODES, dtype=torch.int64, device=mask_BNN.device)
    bits[:, :, :nodes] = mask_BNN
    place = torch.arange(64, device=mask_BNN.device)
    return (bits.view(rows, nodes, 2, 64) << place).sum(-1)


class AttentionPlan(NamedTuple):
    """How a launch is cut; of what decides the order of additions, nothing depends on the number of nodes."""

    tile_rows: int
    block_slots: int
    parts: int
    tiles: int
    warps: int
    stages: int

    def counters(self, kv_rows: int) -> int:
        """Arrival counters that ``kv_rows`` = B x KV heads need."""
        return kv_rows * self.tiles


def plan_attention(query_BHNd: Tensor, keys_BHSd: Tensor) -> AttentionPlan:
    rows, heads, nodes, width = query_BHNd.shape
    kv_heads, slots = keys_BHSd.shape[1], keys_BHSd.shape[2]
    padded = max(16, triton.next_power_of_2(width))
    block = max(16, min(128, 16384 // (padded * keys_BHSd.dtype.itemsize)))
    # About one program per multiprocessor (132 on an H100 or H200) when there is one tile.
    parts = max(1, 132 // (rows * kv_heads))
    parts = min(1 << (parts.bit_length() - 1), 32, triton.next_power_of_2(triton.cdiv(slots, block)))
    wanted = nodes * (heads // kv_heads)
    exact = keys_BHSd.dtype == torch.float32  # without tensor cores larger tiles do not fit into registers
    # One text of SmolLM2 (3 KV heads of 64), 64 nodes over 320 slots: 7.9 us with tiles of 64 rows, 6.7 with 16. Of the
    # 7B shape (32 heads of 128), 32 nodes: 1 to 2 us less with 16 than with 32.
    small = (padded <= 64 and rows * kv_heads <= 8) or (parts > 1 and wanted <= 32)
    tile = 16 if exact or small else min(64, max(16, triton.next_power_of_2(wanted)))
    # Heads of 128: 8 warps take 2 to 3 us of 12 less than 4, where programs do not queue; where they do, 12 to 28 us of
    # a layer more. A third stage gains for large tiles and long walks over the slots; one node of one text loses 6 us.
    deep = padded == 128 and rows * kv_heads <= MANY_HEADS
    warps = 8 if exact or padded > 128 or deep else 4
    stages = 3 if deep and nodes > 1 and (tile == 64 or parts == 1) else 2
    return AttentionPlan(tile, block, parts, triton.cdiv(wanted, tile), warps, stages)


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
    plan = plan_attention(query, keys)
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
        softcap is not None, "ieee" if exact else "tf32", at_B is not None,
        num_warps=plan.warps, num_stages=plan.stages, **early(out),
        enable_fp_fusion=not exact,  # blocks with and without a mask are two texts, which may be fused differently
    )  # fmt: skip
    return out
