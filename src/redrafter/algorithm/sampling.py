"""Everything that shapes the target's distribution, applied per node with that node's own path as history.

Order: logit bias, repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p (the order
of transformers). Tokens of equal logit at a cut are kept together, so the result does not depend on a sort's ties.
"""

from __future__ import annotations

from typing import NamedTuple

from redrafter.algorithm.ops import Array, Ops
from redrafter.algorithm.tree import TokenTree

NEVER = float("-inf")


class Penalties(NamedTuple):
    """Penalty settings and the tokens they count; the root is already counted."""

    repetition: Array  # [B] float32, 1 is off
    presence: Array  # [B] float32, 0 is off
    frequency: Array  # [B] float32, 0 is off
    prompt: Array  # [B, V] float32, times each token stands in the prompt
    answer: Array  # [B, V] float32, times each token stands in the answer so far, the root included


class Sampling(NamedTuple):
    """A batch's sampling settings as arrays. A field is None when no row of the batch uses it."""

    inverse_temperature: Array | None = None  # [B] float32, 0 for greedy rows; None when every row is greedy
    key: Array | None = None  # [B, 2] noise keys (noise.key_of)
    top_k: Array | None = None  # [B] int64, the vocabulary size where off
    top_p: Array | None = None  # [B] float32
    log_min_p: Array | None = None  # [B] float32, -inf where off
    bias: Array | None = None  # [B, V] float32
    penalties: Penalties | None = None
    keep_logits: bool = False  # a row wants log-probabilities


def warp(ops: Ops, logits_BNV: Array, tree: TokenTree, sampling: Sampling) -> Array:
    """The target's scores after every setting of the request, temperature included; excluded tokens are -inf."""
    z = logits_BNV
    if sampling.bias is not None:
        z = z + sampling.bias[:, None, :]
    if sampling.penalties is not None:
        z = _penalise(ops, z, tree, sampling.penalties)
    if sampling.inverse_temperature is not None:
        inverse = sampling.inverse_temperature[:, None, None]
        z = z * ops.where(inverse > 0, inverse, 1.0)
    if sampling.top_k is not None or sampling.top_p is not None:
        z = ops.where(z < _cut(ops, z, sampling), NEVER, z)
    if sampling.log_min_p is not None:
        z = ops.where(z < ops.amax(z) + sampling.log_min_p[:, None, None], NEVER, z)
    return z


def _penalise(ops: Ops, z: Array, tree: TokenTree, penalties: Penalties) -> Array:
    beyond_root = ops.float32(tree.mask & (tree.depth > 0)[:, None, :])
    path_BNV = ops.count_tokens(tree.tokens, beyond_root, z.shape[-1])
    answer = penalties.answer[:, None, :] + path_BNV
    seen = (answer + penalties.prompt[:, None, :]) > 0
    repetition = ops.where(seen, penalties.repetition[:, None, None], 1.0)
    z = ops.where(z > 0, z / repetition, z * repetition)
    present = ops.float32(answer > 0) * penalties.presence[:, None, None]
    return z - present - answer * penalties.frequency[:, None, None]


def _cut(ops: Ops, z: Array, sampling: Sampling) -> Array:
    """[B, N, 1]: the smallest score that top-k followed by top-p keeps."""
    sorted_z = ops.sort_descending(z)
    rank = ops.arange(z.shape[-1], like=z)
    if sampling.top_k is not None:
        # Ties with the k-th score stay in, as they do when the cut is applied to the unsorted scores.
        kth = ops.take_along(sorted_z, ops.full((*z.shape[:2], 1), 0, like=z) + (sampling.top_k - 1)[:, None, None], 2)
        sorted_z = ops.where(sorted_z < kth, NEVER, sorted_z)
    keep = rank[None, None, :] < z.shape[-1]
    if sampling.top_p is not None:
        p = ops.softmax(sorted_z)
        top_p = ops.where(sampling.top_p < 1, sampling.top_p, 2.0)[:, None, None]  # off: no sum rounds to it
        keep = ((ops.cumsum(p) - p) < top_p) | (rank == 0)[None, None, :]
    return -ops.amax(ops.where(keep & (sorted_z > NEVER), -sorted_z, NEVER))
