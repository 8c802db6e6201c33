"""One decoding step of ReDrafter: draft, merge, verify, choose, accept, commit. Start reading here.

Shape letters, here and everywhere: B rows (requests), W beam width, K branching, L draft length, P pool slots,
N tree nodes, F feature width, D hidden width, V vocabulary, S cache slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from redrafter.algorithm.accept import Accepted, choose_accept
from redrafter.algorithm.beam import Drafter, Reading, draft, no_beams
from redrafter.algorithm.noise import gumbel
from redrafter.algorithm.ops import Array, Ops
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.tree import TokenTree, pack
from redrafter.params import DecodeConfig


class Target(Protocol):
    """The LLM being accelerated, with its key/value cache."""

    vocab_size: int

    def verify(self, tree: TokenTree, lengths_B: Array) -> tuple[Array, Array]:
        """One forward over all nodes: logits [B, N, V] in float32 (or, where the stages take it, as the model has
        them) and features [B, N, F]. Writes the nodes' keys and values behind the ``lengths_B`` committed ones; node
        positions are ``lengths_B`` + depth."""

    def commit(self, lengths_B: Array, accepted: Accepted) -> None:
        """Keep the keys and values of the accepted path: ``lengths_B`` + 1 + accepted.length slots are now valid."""


class DecodeState(NamedTuple):
    reading: Reading
    """the target's hidden states (and fused layers) of the tokens committed by the last step, for the drafter"""
    root: Array  # [B] int64 the token the target already guaranteed, emitted but not yet in the cache
    lengths: Array  # [B] int64 tokens in the cache, which is also the root's absolute position
    sampling: Sampling
    ends: Any = None  # where each row's answer ends, on backends that look for it during the step


class Stages(NamedTuple):
    """The parts of a step that a backend may do faster, with the same results; they take ``ops`` first."""

    noise: Callable[..., Any]
    draft: Callable[..., Any]
    pack: Callable[..., TokenTree]
    choose_accept: Callable[..., Accepted]
    advance: Callable[..., DecodeState]


def step(
    ops: Ops,
    target: Target,
    drafter: Drafter | None,
    state: DecodeState,
    shape: DecodeConfig,
    stages: Stages | None = None,
) -> tuple[DecodeState, Accepted, TokenTree]:
    """Emit 1 to shape.deepest + 1 tokens per row. A tree of one node, or no drafter, is plain decoding."""
    stages = stages or STAGES
    speculate = drafter is not None and shape.tree_size > 1
    depths = shape.deepest + 1 if speculate else 1
    noise = stages.noise(ops, target, state, depths)
    beams = no_beams(ops, state.root)
    if drafter is not None and speculate:
        coupled = noise if shape.seed_coupled else None
        beams = stages.draft(ops, drafter, state.reading, state.root, shape, coupled)
    tree = stages.pack(ops, beams, state.root, shape.tree_size)
    logits, features = target.verify(tree, state.lengths)
    gumbel_BDV = None if noise is None else noise[0]
    accepted = stages.choose_accept(ops, logits, tree, state.sampling, gumbel_BDV, depths)
    if state.sampling.keep_logits:
        rows = ops.arange(state.root.shape[0], like=state.root)[:, None]
        accepted = accepted._replace(logits=ops.float32(logits[rows, accepted.path]))
    target.commit(state.lengths, accepted)
    return stages.advance(ops, state, features, accepted), accepted, tree


def step_noise(ops: Ops, target: Target, state: DecodeState, depths: int) -> tuple[Array, Array] | None:
    """Gumbel noise [B, depths, V] for the positions this step chooses, and the inverse temperatures; None if greedy."""
    sampling = state.sampling
    if sampling.inverse_temperature is None:
        return None
    position_BD = state.lengths[:, None] + 1 + ops.arange(depths, like=state.lengths)[None, :]
    tokens_V = ops.arange(target.vocab_size, like=state.lengths)
    return gumbel(ops, sampling.key, position_BD, tokens_V), sampling.inverse_temperature


def advance(ops: Ops, state: DecodeState, features_BNF: Array, accepted: Accepted) -> DecodeState:
    """The state after the accepted tokens: the bonus is the next root."""
    rows = ops.arange(state.root.shape[0], like=state.root)[:, None]
    return DecodeState(
        reading=Reading(
            features=features_BNF[rows, accepted.path],
            tokens=accepted.tokens,
            first=state.lengths,
            count=accepted.length + 1,
        ),
        root=accepted.bonus,
        lengths=state.lengths + 1 + accepted.length,
        sampling=counted(ops, state.sampling, accepted),
        ends=state.ends,
    )


def counted(ops: Ops, sampling: Sampling, accepted: Accepted) -> Sampling:
    """The settings, with the accepted tokens in the counts that penalties rest on."""
    if sampling.penalties is None:
        return sampling
    depths = accepted.tokens.shape[1]
    emitted = ops.arange(depths, like=accepted.length)[None, :] <= accepted.length[:, None]
    vocab = sampling.penalties.answer.shape[1]
    count = ops.count_tokens(accepted.tokens, ops.float32(emitted)[:, None, :], vocab)[:, 0]
    answer = sampling.penalties.answer + count
    return sampling._replace(penalties=sampling.penalties._replace(answer=answer))


STAGES = Stages(step_noise, draft, pack, choose_accept, advance)
"""This text's own."""
