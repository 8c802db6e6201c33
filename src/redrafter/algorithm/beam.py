"""Beam search over the drafter's step; keeps every scored candidate and its back-pointer (paper section 3.2)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from redrafter.algorithm.lookup import Chain, mixed
from redrafter.algorithm.ops import Array, Ops
from redrafter.params import DecodeConfig

DEAD = -1.0e30  # a score that no path reaches: marks pool slots that must not be verified


class DraftBeams(NamedTuple):
    """The pool: every (beam, child) pair that was scored, depth by depth, so a parent stands before its children."""

    tokens: Array  # [B, P] int64 target token ids
    parent: Array  # [B, P] int64 pool slot of the parent, -1 for children of the root
    depth: Array  # [B, P] int64, 1 for children of the root
    score: Array
    """[B, P] float32 path score: the sum of log child weights from the root; a child's is never above its parent's"""
    final: Array  # [B, W] int64 pool slots of the beams that survived to the last depth, best first
    draft_length: int
    tail: int = 0
    """slots at the pool's end, one a depth: what was looked up goes on below the beams"""


class Reading(NamedTuple):
    """What the target has read since the drafter last looked: pair i is (features at position first + i, the token
    at position first + i + 1). The last pair's token is the root. Pairs past ``count`` repeat the last one."""

    features: Array  # [B, T, F]
    tokens: Array  # [B, T] int64
    first: Array  # [B] int64 absolute position of pair 0
    count: Array  # [B] int64, at least 1


class Drafter(Protocol):
    """What the beam search asks of a drafter. Its state is opaque; beams are on axis 1 of every array in it."""

    def begin(self, reading: Reading) -> Any:
        """One beam per row: the state after the root was read."""

    def extend(self, state: Any, beam_BW: Array, token_BW: Array) -> Any:
        """W beams: beam w continues beam ``beam_BW[:, w]`` of ``state`` by ``token_BW[:, w]`` (a target id)."""

    def logits(self, state: Any) -> Array:
        """[B, W, V_d] float32: scores of the next token over the draft vocabulary."""

    def recall(self, reading: Reading, length: int) -> Chain | None:
        """What followed when each row's text last ended like this (``lookup.py``), after ``begin`` has read it."""

    @property
    def token_ids(self) -> Array | None:
        """[V_d] target ids of the draft vocabulary; None when it is the target's own."""


def draft(
    ops: Ops,
    drafter: Drafter,
    reading: Reading,
    root_B: Array,
    shape: DecodeConfig,
    noise: tuple[Array, Array] | None = None,
) -> DraftBeams:
    """Write candidate continuations of the root.

    ``noise`` = (gumbel [B, draft_length, V], inverse temperature [B]): seed-coupled beams rank children by
    log q + G, the very noise the target will add, and weigh them by softmax of that (docs/algorithm.md);
    a row whose inverse temperature is 0 is greedy and ignores it. Without noise a child's weight is q. Where the
    shape has ``prompt_lookup``, what the drafter recalls is mixed into the weights.
    """
    state = drafter.begin(reading)
    chain = drafter.recall(reading, shape.deepest) if shape.prompt_lookup else None
    rows = root_B.shape[0]
    slot_BW = ops.full((rows, 1), -1, like=root_B)
    score_BW = ops.full((rows, 1), 0.0, like=root_B)
    follows_BW = ops.full((rows, 1), True, like=root_B)
    pool: list[tuple[Array, Array, Array, Array]] = []
    size = 0
    for depth in range(1, shape.draft_length + 1):
        logits_BWV = drafter.logits(state)
        if noise is not None:
            logits_BWV = _couple(ops, logits_BWV, noise[0][:, depth - 1], noise[1], drafter.token_ids)
        # From the root there is one beam, so it must have enough children to fill the next depth's beams.
        children = max(shape.branching, shape.beam_width) if depth == 1 else shape.branching
        children = min(children, logits_BWV.shape[-1])
        best_BWK, index_BWK = ops.top_k(logits_BWV, children)
        token_BWK = index_BWK if drafter.token_ids is None else drafter.token_ids[index_BWK]
        weight_BWK = best_BWK - ops.logsumexp(logits_BWV)
        if chain is not None:
            token_BWK, weight_BWK, hit_BWK = mixed(ops, chain, depth, follows_BW, token_BWK, weight_BWK)
        above_BW1 = score_BW[:, :, None]
        child_BWK = weight_BWK + above_BW1
        # Rounding may lift a child over its parent, and a broken drafter may say NaN: neither may reorder the tree.
        child_BWK = ops.where(child_BWK <= above_BW1, child_BWK, above_BW1)
        beams = child_BWK.shape[1]
        child_BC, token_BC = child_BWK.reshape(rows, -1), token_BWK.reshape(rows, -1)
        parent_BC = (slot_BW[:, :, None] + ops.full((rows, beams, children), 0, like=root_B)).reshape(rows, -1)
        pool.append((token_BC, parent_BC, ops.full((rows, beams * children), depth, like=root_B), child_BC))
        width = min(shape.beam_width, beams * children)
        score_BW, winner_BW = ops.top_k(child_BC, width)
        slot_BW = winner_BW + size
        size += beams * children
        if depth < shape.draft_length:
            token_BW = ops.take_along(token_BC, winner_BW, 1)
            state = drafter.extend(state, winner_BW // children, token_BW)
            if chain is not None:
                follows_BW = ops.take_along(hit_BWK.reshape(rows, -1), winner_BW, 1)
    tail = 0
    if chain is not None and shape.deepest > shape.draft_length:
        children_BC = hit_BWK.reshape(rows, -1), child_BC
        pool.append(_tail(ops, chain, children_BC, size, shape.draft_length))
        tail = shape.deepest - shape.draft_length
    tokens_BP, parent_BP, depth_BP, pool_BP = (ops.concat([level[i] for level in pool], 1) for i in range(4))
    return DraftBeams(tokens_BP, parent_BP, depth_BP, pool_BP, slot_BW, shape.draft_length, tail)


def _tail(
    ops: Ops, chain: Chain, children_BC: tuple[Array, Array], size: int, draft_length: int
) -> tuple[Array, Array, Array, Array]:
    """Below the child of the last depth that follows the chain: the rest of the chain. ``children_BC``: which do, and
    their scores; they are the last of ``size`` slots."""
    hit_BC, child_BC = children_BC
    tokens_BT = chain.tokens[:, draft_length:]
    before_BC = ops.where(hit_BC, child_BC, DEAD)
    last_B1 = ops.argmax(before_BC)[:, None]
    above_B1 = ops.take_along(before_BC, last_B1, 1)
    count_T = ops.arange(tokens_BT.shape[1], like=tokens_BT)[None] + 0 * tokens_BT
    score_BT = above_B1 + ops.cumsum(ops.log(chain.weight[:, draft_length:]))
    score_BT = ops.where(above_B1 > DEAD / 2, score_BT, DEAD)
    parent_BT = ops.where(count_T == 0, last_B1 + size - child_BC.shape[1], size - 1 + count_T)
    return tokens_BT, parent_BT, count_T + draft_length + 1, score_BT


def _couple(
    ops: Ops, logits_BWV: Array, noise_BV: Array, inverse_temperature_B: Array, token_ids: Array | None
) -> Array:
    """log q / T + G for rows that sample, log q for greedy rows (inverse temperature 0)."""
    if token_ids is not None:
        noise_BV = noise_BV[:, token_ids]
    inverse = inverse_temperature_B[:, None, None]
    return ops.where(inverse > 0, logits_BWV * inverse + noise_BV[:, None, :], logits_BWV)


def no_beams(ops: Ops, root_B: Array) -> DraftBeams:
    """An empty pool: the tree is then its root, which is plain decoding."""
    empty = ops.full((root_B.shape[0], 0), 0, like=root_B)
    return DraftBeams(empty, empty, empty, ops.float32(empty), empty, draft_length=0)


def beam_tokens(ops: Ops, beams: DraftBeams) -> tuple[Array, Array]:
    """The final beams, by following back-pointers: tokens [B, W, L] and path scores [B, W, L] of every prefix."""
    slot_BW = beams.final
    tokens, scores = [], []
    for _ in range(beams.draft_length):
        tokens.append(ops.take_along(beams.tokens, slot_BW, 1))
        scores.append(ops.take_along(beams.score, slot_BW, 1))
        slot_BW = ops.take_along(beams.parent, slot_BW, 1)
        slot_BW = ops.where(slot_BW < 0, slot_BW * 0, slot_BW)  # only after the last step, where it is not read
    return ops.stack(tokens[::-1], 2), ops.stack(scores[::-1], 2)
