"""Dynamic tree attention: the beams' pool becomes one tree of fixed size (paper section 3.3).

Beam search never emits the same (parent, token) pair twice, so its back-pointers already are the prefix tree; what is
left is to choose nodes, renumber them, and say who may attend to whom.
"""

from __future__ import annotations

from typing import NamedTuple

from redrafter.algorithm.beam import DEAD, DraftBeams
from redrafter.algorithm.ops import Array, Ops


class TokenTree(NamedTuple):
    """N nodes, the root first, parents before children. Every prefix of the list is itself a tree."""

    tokens: Array  # [B, N] int64
    parent: Array  # [B, N] int64 index of the parent node; the root's is 0
    depth: Array  # [B, N] int64, root 0
    mask: Array  # [B, N, N] bool: node i attends to node j, that is, j is i or an ancestor of i
    live: Array  # [B, N] bool: False where a node exists only to fill the shape and may not be accepted
    ancestors: Array | None = None  # the mask as bits, where a backend packs it so


def pack(ops: Ops, beams: DraftBeams, root: Array, tree_size: int) -> TokenTree:
    """The root [B] and the best ``tree_size - 1`` nodes of the pool by path score.

    The set is prefix-closed because a child never outscores its parent, and the sort is stable on a pool whose parents
    stand first, so this holds on ties too. Optimal for a deterministic tree (docs/algorithm.md).
    """
    root_B1 = root[:, None]
    rows, pool = beams.score.shape
    zero_B1 = root_B1 * 0
    if tree_size == 1 or pool == 0:
        one = ops.full((rows, 1, 1), True, like=root)
        return TokenTree(root_B1, zero_B1, zero_B1, one, one[:, 0])
    count = min(tree_size - 1, pool)
    order_BP = ops.argsort_descending(beams.score)
    slot_BN = order_BP[:, :count]
    # rank[slot] = place in the order: the inverse permutation, found by sorting the permutation itself.
    rank_BP = ops.argsort_descending(-order_BP)
    parent_slot_BN = ops.take_along(beams.parent, slot_BN, 1)
    of_root = parent_slot_BN < 0
    parent_rank = ops.take_along(rank_BP, ops.where(of_root, zero_B1, parent_slot_BN), 1)
    parent_BN = ops.concat([zero_B1, ops.where(of_root, zero_B1, parent_rank + 1)], 1)
    tokens_BN = ops.concat([root_B1, ops.take_along(beams.tokens, slot_BN, 1)], 1)
    depth_BN = ops.concat([zero_B1, ops.take_along(beams.depth, slot_BN, 1)], 1)
    live_BN = ops.concat([zero_B1 == 0, ops.take_along(beams.score, slot_BN, 1) > DEAD / 2], 1)
    return TokenTree(
        tokens_BN, parent_BN, depth_BN, ancestor_mask(ops, parent_BN, beams.draft_length + beams.tail), live_BN
    )


def ancestor_mask(ops: Ops, parent_BN: Array, draft_length: int) -> Array:
    """[B, N, N] bool by doubling: a relation that reaches d generations up, applied twice, reaches 2d.

    Same as the recurrence mask[u] = mask[parent(u)] | bit(u), in log2(depth) products instead of N steps.
    """
    nodes = parent_BN.shape[1]
    self_or_parent = ops.one_hot(parent_BN, nodes) | ops.one_hot(ops.arange(nodes, like=parent_BN), nodes)[None]
    reach_BNN = ops.float32(self_or_parent)
    generations = 1
    while generations < draft_length:
        reach_BNN = ops.float32((reach_BNN @ reach_BNN) > 0)
        generations *= 2
    return reach_BNN > 0


def keep_final_beams(ops: Ops, beams: DraftBeams) -> DraftBeams:
    """The paper's tree: only pool nodes on one of the final beams keep their score, the others become dead.

    Used to compare with the reference implementation and to report what merging saves there.
    """
    rows, pool = beams.score.shape
    on_beam_BP = ops.full((rows, pool), False, like=beams.parent)
    slot_BW = beams.final
    for _ in range(beams.draft_length):
        on_beam_BP = on_beam_BP | (ops.sum(ops.one_hot(slot_BW, pool).swapaxes(-1, -2)) > 0)
        parent_BW = ops.take_along(beams.parent, slot_BW, 1)
        slot_BW = ops.where(parent_BW < 0, 0, parent_BW)  # the root has no slot; by then the loop is over
    return beams._replace(score=ops.where(on_beam_BP, beams.score, DEAD))


def unmerged_tokens(ops: Ops, tree: TokenTree) -> Array:
    """[B]: rows that the same paths would take unmerged, each leaf with its own copy of its path, the root included.

    1 - live nodes / this = the share of tokens that merging shared prefixes removes (paper section 3.3: 30-60 %).
    """
    nodes = tree.parent.shape[1]
    is_child = tree.live & (tree.depth > 0)
    parent_BN = ops.where(is_child, tree.parent, nodes)
    has_child_BN = (ops.one_hot(parent_BN, nodes + 1)[..., :nodes]).swapaxes(-1, -2)
    leaf_BN = tree.live & (ops.sum(has_child_BN) == 0)
    return ops.sum(ops.where(leaf_BN, tree.depth + 1, 0))
