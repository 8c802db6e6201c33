"""Decoding rules that are wrong on purpose. Each must fail the test that the right one passes."""

from __future__ import annotations

import torch
from tables import STATES
from torch import Tensor

from redrafter.algorithm.accept import Accepted, accept, choose
from redrafter.algorithm.beam import beam_tokens, draft, no_beams
from redrafter.algorithm.noise import gumbel
from redrafter.algorithm.step import advance, step_noise
from redrafter.algorithm.tree import TokenTree, pack


def faulty_step(fault: str):
    """The lines of ``step`` with one of them spoilt: node_noise, sibling_seen, parent_off_by_one; or none."""

    def step(ops, target, drafter, state, shape):
        depths = shape.deepest + 1
        noise = step_noise(ops, target, state, depths)
        beams = draft(ops, drafter, state.reading, state.root, shape, noise if shape.seed_coupled else None)
        tree = pack(ops, beams, state.root, shape.tree_size)
        logits, features = target.verify(_sibling_seen(tree) if fault == "sibling_seen" else tree, state.lengths)
        choosing, choosing_noise = tree, noise[0]
        if fault == "node_noise":
            node = torch.arange(tree.tokens.shape[1]).expand(tree.tokens.shape)
            choosing = tree._replace(depth=node)
            tokens = torch.arange(target.vocab_size)
            choosing_noise = gumbel(ops, state.sampling.key, state.lengths[:, None] + 1 + node, tokens)
        choice = choose(ops, logits, choosing, state.sampling, choosing_noise)
        walked = tree
        if fault == "parent_off_by_one":
            walked = tree._replace(parent=(tree.parent - 1).clamp(min=0))
        accepted = accept(ops, walked, choice, depths)
        target.commit(state.lengths, accepted)
        return advance(ops, state, features, accepted), accepted, tree

    return step


def _sibling_seen(tree: TokenTree) -> TokenTree:
    """Every node also attends to its siblings."""
    siblings = (tree.parent[:, :, None] == tree.parent[:, None, :]) & (tree.depth > 0)[:, None, :]
    return tree._replace(mask=tree.mask | (siblings & (tree.depth > 0)[:, :, None]))


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def _result(path: Tensor, length: Tensor, tokens: Tensor) -> Accepted:
    return Accepted(path, length, tokens[:, -1], tokens, torch.ones_like(length, dtype=torch.bool))


def rejection_step(residual: bool, seed: int = 0):
    """One token drawn from q, kept with probability min(1, p/q); the correction is drawn from (p - q)+, or, which is
    wrong, from p. With the residual it is the classical exact rule (Leviathan et al., Chen et al.)."""
    generator = torch.Generator().manual_seed(seed)

    def step(ops, target, drafter, state, shape):
        q = drafter.logits(drafter.begin(state.reading))[:, 0].softmax(-1)
        drafted = _draw(q, generator)[:, None]
        one = torch.ones_like(drafted)
        tree = TokenTree(
            tokens=torch.cat([state.root[:, None], drafted], 1),
            parent=torch.cat([0 * one, 0 * one], 1),
            depth=torch.cat([0 * one, one], 1),
            mask=torch.tensor([[True, False], [True, True]]).expand(len(one), 2, 2),
            live=torch.ones(len(one), 2, dtype=torch.bool),
        )
        logits, features = target.verify(tree, state.lengths)
        p = logits.softmax(-1)
        ratio = (p[:, 0].gather(1, drafted) / q.gather(1, drafted))[:, 0]
        kept = torch.rand(len(ratio), generator=generator) < ratio
        rest = (p[:, 0] - q).clamp(min=0) + 1e-30 if residual else p[:, 0]
        bonus = torch.where(kept, _draw(p[:, 1], generator), _draw(rest, generator))
        path = torch.stack([torch.zeros_like(bonus), kept.long()], 1)
        tokens = torch.stack([torch.where(kept, drafted[:, 0], bonus), bonus], 1)
        accepted = _result(path, kept.long(), tokens)
        target.commit(state.lengths, accepted)
        return advance(ops, state, features, accepted), accepted, tree

    return step


def longest_beam_step(seed: int = 0):
    """The reference implementation's sampling: every beam is tested by itself against fresh uniform numbers, the one
    that keeps most wins, and the next token is drawn from (p - q)+ there, or from p after a whole beam."""
    generator = torch.Generator().manual_seed(seed)

    def step(ops, target, drafter, state, shape):
        tokens_BWL, _ = beam_tokens(ops, draft(ops, drafter, state.reading, state.root, shape))
        rows, width, length = tokens_BWL.shape
        tree = _beams_side_by_side(ops, state.root, tokens_BWL)
        logits, features = target.verify(tree, state.lengths)
        # Node 1 + w * L + d is beam w's token d; before it stands its parent, or the root.
        node = 1 + torch.arange(width * length).view(width, length)
        at = torch.cat([torch.zeros(width, 1, dtype=torch.int64), node], 1)
        p = logits.softmax(-1)[:, at]
        history = (target.committed[:, None] + (tree.mask * target.nodes[:, None, :]).sum(-1)) % STATES
        q = drafter.logits_SV[history].softmax(-1)[:, at]
        ratio = (p[:, :, :-1] / q[:, :, :-1]).gather(3, tokens_BWL[..., None])[..., 0]
        kept = (torch.rand(ratio.shape, generator=generator) < ratio).long().cumprod(-1)
        count, best = kept.sum(-1).max(1)
        row = torch.arange(rows)
        end_p, end_q = p[row, best, count], q[row, best, count]
        rest = torch.where((count == length)[:, None], end_p, (end_p - end_q).clamp(min=0) + 1e-30)
        bonus = _draw(rest, generator)
        depth = torch.arange(length + 1)[None]
        path = at[best].gather(1, depth.clamp(max=length).expand(rows, -1).minimum(count[:, None]))
        drafted = torch.cat([tokens_BWL[row, best], bonus[:, None]], 1)
        accepted = _result(path, count, torch.where(depth < count[:, None], drafted, bonus[:, None]))
        target.commit(state.lengths, accepted)
        return advance(ops, state, features, accepted), accepted, tree

    return step


def _beams_side_by_side(ops, root: Tensor, tokens_BWL: Tensor) -> TokenTree:
    """No merging: every beam has its own copy of its path below the root."""
    rows, width, length = tokens_BWL.shape
    node = 1 + torch.arange(width * length)
    parent = torch.cat([torch.zeros(1, dtype=torch.int64), torch.where((node - 1) % length == 0, 0, node - 1)])
    depth = torch.cat([torch.zeros(1, dtype=torch.int64), (node - 1) % length + 1])
    empty = pack(ops, no_beams(ops, root), root, 1)
    mask = torch.eye(len(parent), dtype=torch.bool)
    for i in range(1, len(parent)):
        mask[i] |= mask[parent[i]]
    return empty._replace(
        tokens=torch.cat([root[:, None], tokens_BWL.reshape(rows, -1)], 1),
        parent=parent.expand(rows, -1),
        depth=depth.expand(rows, -1),
        mask=mask.expand(rows, -1, -1),
        live=torch.ones(rows, len(parent), dtype=torch.bool),
    )
