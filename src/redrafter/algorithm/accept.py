"""The target chooses its own token at every node; the tree keeps the longest path that it agrees with.

Exact for any tree: every emitted token is the target's own choice given its own prefix (docs/algorithm.md), and no
rule can accept more from a tree that was fixed beforehand (same page).
"""

from __future__ import annotations

from typing import NamedTuple

from redrafter.algorithm.ops import Array, Ops
from redrafter.algorithm.sampling import Sampling, warp
from redrafter.algorithm.tree import TokenTree

LARGEST = 3.0e38  # scores beyond it, and NaN, are not finite


class Accepted(NamedTuple):
    path: Array
    """[B, L+1] int64 node on the accepted path at each depth (0 the root); past ``length`` the last node repeats"""
    length: Array  # [B] int64 drafted tokens accepted, the root and the bonus not counted
    bonus: Array  # [B] int64 the target's own extra token
    tokens: Array
    """[B, L+1] int64 what is emitted: ``length`` drafted tokens, then the bonus (which repeats to the end)"""
    finite: Array  # [B] bool: False where the logits that chose an emitted token were not finite
    logits: Array | None = None  # [B, L+1, V] float32 the target's own along the path, where ``keep_logits``


class Choice(NamedTuple):
    token: Array  # [B, N] int64 the target's next token after each node
    finite: Array  # [B, N] bool: the winning score is a finite number


def choose(ops: Ops, logits_BNV: Array, tree: TokenTree, sampling: Sampling, noise_BPV: Array | None) -> Choice:
    """argmax(warped logits + G) at every node; nodes of one depth share the noise of the position they choose for."""
    z = warp(ops, logits_BNV, tree, sampling)
    if noise_BPV is not None and sampling.inverse_temperature is not None:
        row = ops.arange(tree.depth.shape[0], like=tree.depth)[:, None]
        sampled = (sampling.inverse_temperature > 0)[:, None, None]
        z = ops.where(sampled, z + noise_BPV[row, tree.depth], z)
    token_BN = ops.argmax(z)
    best = ops.take_along(z, token_BN[:, :, None], 2)[:, :, 0]
    return Choice(token_BN, (best > -LARGEST) & (best < LARGEST))


def accept(ops: Ops, tree: TokenTree, choice: Choice, depths: int) -> Accepted:
    """A node is accepted iff it and every ancestor is what the target chose after its parent. ``depths`` = L + 1.

    Siblings have distinct tokens, so the accepted nodes form one path.
    """
    token_BN = choice.token
    chosen_BN = (tree.tokens == ops.take_along(token_BN, tree.parent, 1)) & tree.live
    match_BN = chosen_BN | (tree.depth == 0)
    on_path_BN = ops.sum(tree.mask & ~match_BN[:, None, :]) == 0
    length_B = ops.sum(on_path_BN) - 1
    # For every depth the accepted node at that depth; deeper than the path, the last accepted one.
    depth_D = ops.arange(depths, like=tree.depth)[None, :]
    wanted_BD = ops.where(depth_D < length_B[:, None], depth_D, length_B[:, None])
    hit_BDN = on_path_BN[:, None, :] & (tree.depth[:, None, :] == wanted_BD[:, :, None])
    path_BD = ops.argmax(ops.float32(hit_BDN))
    next_BD = ops.take_along(token_BN, path_BD, 1)
    bonus_B = next_BD[:, -1]
    finite_B = ops.sum(ops.take_along(choice.finite, path_BD, 1)) == depths
    return Accepted(path_BD, length_B, bonus_B, next_BD, finite_B)


def choose_accept(
    ops: Ops, logits_BNV: Array, tree: TokenTree, sampling: Sampling, noise_BPV: Array | None, depths: int
) -> Accepted:
    return accept(ops, tree, choose(ops, logits_BNV, tree, sampling, noise_BPV), depths)
