"""The pool becomes a token tree in one kernel, one program per row. The eager twin is ``algorithm/tree.pack``.

B rows, P pool slots, N nodes. A node's ancestors are two 64-bit words, which the tree attention reads as they are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.beam import DEAD, DraftBeams
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.topk import NO_KEY, key_index, order_key

MAX_NODES = 128  # bits in a node's ancestor words
MAX_POOL = 4096  # slots that one program sorts
_LIVE = tl.constexpr(DEAD / 2)


class PackedTree(NamedTuple):
    tree: TokenTree
    ancestors: Tensor  # [B, N, 2] int64: bit j % 64 of word j // 64 says that node j is the node or its ancestor


@triton.jit
def _pack(
    pool_token, pool_parent, pool_depth, pool_score, root, rank_of, tokens, parent, depth, mask, live, ancestors,
    DEEPEST: tl.constexpr, POOL: tl.constexpr, NODES: tl.constexpr, POOL_P: tl.constexpr, NODES_P: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, POOL_P)
    exists = place < POOL
    score = tl.load(pool_score + row * POOL + place, mask=exists, other=0.0)
    # Keys are distinct, so the order is the algorithm's stable one. From here on ``place`` is a rank.
    slot = key_index(tl.sort(tl.where(exists, order_key(score, place), NO_KEY), descending=True))
    tl.store(rank_of + row * POOL + slot, place, mask=exists)
    tl.debug_barrier()

    kept = exists & (place < NODES - 1)
    at = row * POOL + slot
    slot_above = tl.load(pool_parent + at, mask=kept, other=-1)
    rank_above = tl.load(rank_of + row * POOL + slot_above, mask=kept & (slot_above >= 0), other=-1)
    to = row * NODES + place + 1
    tl.store(tokens + to, tl.load(pool_token + at, mask=kept, other=0), mask=kept)
    tl.store(depth + to, tl.load(pool_depth + at, mask=kept, other=0), mask=kept)
    tl.store(parent + to, (rank_above + 1).to(tl.int64), mask=kept)
    tl.store(live + to, (tl.load(pool_score + at, mask=kept, other=0.0) > _LIVE).to(tl.int8), mask=kept)
    tl.store(tokens + row * NODES, tl.load(root + row))
    tl.store(depth + row * NODES, row * 0)
    tl.store(parent + row * NODES, row * 0)
    tl.store(live + row * NODES, (row * 0 + 1).to(tl.int8))
    tl.debug_barrier()

    node = tl.arange(0, NODES_P).to(tl.int64)
    is_node = node < NODES
    one = tl.full([NODES_P], 1, tl.int64)
    low = tl.where(node < 64, one << (node & 63), 0)
    high = tl.where(node < 64, 0, one << (node & 63))
    above = node
    for _ in range(DEEPEST):
        above = tl.load(parent + row * NODES + above, mask=is_node, other=0)
        low |= tl.where(above < 64, one << (above & 63), 0)
        high |= tl.where(above < 64, 0, one << (above & 63))
    words = ancestors + (row * NODES + node) * 2
    tl.store(words, low, mask=is_node)
    tl.store(words + 1, high, mask=is_node)

    other = tl.arange(0, NODES_P).to(tl.int64)[None, :]
    word = tl.where(other < 64, low[:, None], high[:, None])
    seen = ((word >> (other & 63)) & 1).to(tl.int8)
    inside = is_node[:, None] & (other < NODES)
    tl.store(mask + (row * NODES + node[:, None]) * NODES + other, seen, mask=inside)


def pack(beams: DraftBeams, root_B: Tensor, tree_size: int) -> PackedTree:
    """``algorithm.tree.pack`` and the ancestors as bits; a pool of 1 to MAX_POOL slots, 2 to MAX_NODES nodes."""
    rows, pool = beams.score.shape
    nodes = min(tree_size, pool + 1)
    assert 1 <= pool <= MAX_POOL and 2 <= nodes <= MAX_NODES
    assert all(x.is_contiguous() for x in (beams.tokens, beams.parent, beams.depth, beams.score, root_B))
    device = root_B.device
    tokens, parent, depth = (torch.empty(rows, nodes, dtype=torch.int64, device=device) for _ in range(3))
    mask = torch.empty(rows, nodes, nodes, dtype=torch.bool, device=device)
    live = torch.empty(rows, nodes, dtype=torch.bool, device=device)
    ancestors = torch.empty(rows, nodes, 2, dtype=torch.int64, device=device)
    padded = max(triton.next_power_of_2(pool), 16)
    _pack[(rows,)](
        beams.tokens,
        beams.parent,
        beams.depth,
        beams.score,
        root_B,
        torch.empty(rows, pool, dtype=torch.int32, device=device),
        tokens,
        parent,
        depth,
        mask.view(torch.int8),
        live.view(torch.int8),
        ancestors,
        DEEPEST=beams.draft_length + beams.tail,
        POOL=pool,
        NODES=nodes,
        POOL_P=padded,
        NODES_P=triton.next_power_of_2(nodes),
        num_warps=4 if padded <= 512 else 16,
        **early(tokens),
    )
    return PackedTree(TokenTree(tokens, parent, depth, mask, live), ancestors)
