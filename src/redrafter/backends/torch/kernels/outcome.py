"""What the host is told of a step, in one launch; its eager twin: ``BaseBackend.fetch``. B rows, N nodes, D depths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.kernels.early import early, start_early


@triton.jit
def _pack_outcome(
    emitted, length, finite, tokens, parent, depth, live, packed,
    DEPTHS: tl.constexpr, NODES: tl.constexpr, DEPTHS_P: tl.constexpr, NODES_P: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES_P)
    real = node < NODES
    start = row * NODES
    # The tree is older than the launch before.
    above = tl.load(parent + start + node, mask=real, other=-1)
    token = tl.load(tokens + start + node, mask=real, other=0)
    alive = (tl.load(live + start + node, mask=real, other=0) != 0) & real
    level = tl.load(depth + start + node, mask=real, other=0)
    # A leaf is a live node that is no live node's parent; the root is its own parent, which does not count.
    child = (alive & (level > 0))[:, None] & (above[:, None] == node[None, :])
    leaf = alive & (tl.sum(child.to(tl.int32), axis=0) == 0)
    unmerged = tl.sum(tl.where(leaf, level + 1, 0), axis=0)
    start_early(EARLY)
    to = packed + row * (DEPTHS + 2 * NODES + 5)
    step = tl.arange(0, DEPTHS_P)
    tl.store(to + step, tl.load(emitted + row * DEPTHS + step, mask=step < DEPTHS, other=0), mask=step < DEPTHS)
    tl.store(to + DEPTHS + node, token, mask=real)
    tl.store(to + DEPTHS + NODES + node, above, mask=real)
    rest = to + DEPTHS + 2 * NODES
    tl.store(rest, tl.load(length + row))
    tl.store(rest + 1, (tl.load(finite + row) != 0).to(tl.int64))
    tl.store(rest + 2, tl.sum(alive.to(tl.int64), axis=0))
    tl.store(rest + 3, unmerged)
    tl.store(rest + 4, row * 0 + DEPTHS)


def pack_outcome(accepted: Accepted, tree: TokenTree) -> Tensor:
    """[B, D + 2 N + 5] int64: tokens | the tree's tokens | parents | accepted, finite, nodes, unmerged, D."""
    rows, depths = accepted.tokens.shape
    nodes = tree.tokens.shape[1]
    packed = torch.empty(rows, depths + 2 * nodes + 5, dtype=torch.int64, device=tree.tokens.device)
    told = (accepted.tokens, accepted.length, accepted.finite.view(torch.int8))
    arrays = (*told, tree.tokens, tree.parent, tree.depth, tree.live.view(torch.int8))
    assert all(x.is_contiguous() for x in arrays)
    _pack_outcome[(rows,)](
        *arrays, packed, DEPTHS=depths, NODES=nodes,
        DEPTHS_P=triton.next_power_of_2(depths), NODES_P=triton.next_power_of_2(nodes), num_warps=4, **early(packed),
    )  # fmt: skip
    return packed
