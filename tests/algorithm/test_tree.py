"""Tree packing against a dictionary of prefixes, the mask against the recurrence, and what every tree must satisfy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import OPS, Shape
from test_beam import PROMPTS, V, run, written_out

from redrafter.algorithm.beam import DEAD, DraftBeams, beam_tokens, no_beams
from redrafter.algorithm.tree import TokenTree, ancestor_mask, keep_final_beams, pack, unmerged_tokens

ROOT = torch.tensor([p[-1] for p in PROMPTS])


def node_paths(tree: TokenTree, row: int) -> list[tuple[int, ...]]:
    """Tokens below the root on the way to every node, by parent pointers."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parent[row, node])
        assert parent < node, "parents stand before their children"
        paths.append((*paths[parent], int(tree.tokens[row, node])))
    return paths


def mask_by_recurrence(parent: list[int]) -> list[int]:
    """mask[u] = mask[parent(u)] | bit(u), as Python integers."""
    masks = [1]
    for node in range(1, len(parent)):
        masks.append(masks[parent[node]] | 1 << node)
    return masks


def check(tree: TokenTree, beams: DraftBeams, size: int) -> None:
    for row in range(tree.tokens.shape[0]):
        scores = dict(zip(written_out(beams, row), beams.score[row].tolist(), strict=True))
        paths = node_paths(tree, row)
        assert len(paths) == min(size, 1 + len(scores))
        assert len(set(paths)) == len(paths), "siblings are distinct"
        assert [len(p) for p in paths] == tree.depth[row].tolist()
        # The best nodes of the pool, whatever their order among equals.
        best = sorted(scores.values(), reverse=True)[: len(paths) - 1]
        assert [scores[p] for p in paths[1:]] == best
        masks = mask_by_recurrence(tree.parent[row].tolist())
        ours = [sum(1 << j for j, seen in enumerate(line) if seen) for line in tree.mask[row].tolist()]
        assert ours == masks
        # A dictionary of prefixes says the same: a node sees the prefixes of its own path and nothing else.
        index = {path: i for i, path in enumerate(paths)}
        for i, path in enumerate(paths):
            assert masks[i] == sum(1 << index[path[:d]] for d in range(len(path) + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 8), (2, 3), (5, 4), (16, 2), (64, 8)]),
    st.integers(1, 128),
    st.sampled_from([1, 2, V, 100]),
    st.sampled_from(["perfect", "random", "worst", "broken"]),
)
def test_any_tree(beam_shape, size, branching, kind):
    beams = run(Shape(*beam_shape, size, branching), kind=kind)
    check(pack(OPS, beams, ROOT, size), beams, size)


@pytest.mark.parametrize("size", [1, 2, 3, 128])
@pytest.mark.parametrize("beam_shape", [(1, 1), (64, 8)])
def test_the_smallest_and_the_largest(beam_shape, size):
    beams = run(Shape(*beam_shape, size, branching=8))
    check(pack(OPS, beams, ROOT, size), beams, size)


def test_every_prefix_of_the_list_is_the_smaller_tree():
    beams = run(Shape(5, 5, 1))
    whole = pack(OPS, beams, ROOT, 64)
    for size in range(1, whole.tokens.shape[1] + 1):
        smaller = pack(OPS, beams, ROOT, size)
        assert torch.equal(smaller.tokens, whole.tokens[:, :size])
        assert torch.equal(smaller.parent, whole.parent[:, :size])
        assert torch.equal(smaller.mask, whole.mask[:, :size, :size])


def test_equal_scores_keep_parents_first():
    """A chain of certain tokens: every node of it scores 0."""
    depth = torch.arange(1, 7)[None]
    beams = DraftBeams(
        tokens=depth + 10,
        parent=depth - 2,
        depth=depth,
        score=torch.zeros(1, 6),
        final=torch.tensor([[5]]),
        draft_length=6,
    )
    for size in range(1, 8):
        tree = pack(OPS, beams, torch.tensor([10]), size)
        assert tree.parent[0].tolist() == [0, *range(size - 1)]
        assert tree.tokens[0].tolist() == list(range(10, 10 + size))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=60))
def test_mask_of_any_parent_list(numbers):
    parent = [0] + [int(x * node) for node, x in enumerate(numbers, start=1)]
    mask = ancestor_mask(OPS, torch.tensor([parent]), len(parent))[0]
    assert [sum(1 << j for j, seen in enumerate(line) if seen) for line in mask.tolist()] == mask_by_recurrence(parent)


def test_the_papers_tree_holds_the_final_beams_and_nothing_else():
    beams = run(Shape(4, 4, 1, branching=V))
    tree = pack(OPS, keep_final_beams(OPS, beams), ROOT, 1 + 4 * 4)
    tokens, _ = beam_tokens(OPS, beams)
    for row in range(len(PROMPTS)):
        prefixes = {tuple(beam[:d]) for beam in tokens[row].tolist() for d in range(len(beam) + 1)}
        live = tree.live[row].nonzero().flatten().tolist()
        paths = node_paths(tree, row)
        assert {paths[i] for i in live} == prefixes
        assert len(live) == len(prefixes)
    assert bool((unmerged_tokens(OPS, tree) == 4 * 5).all()), "four beams of four tokens, each with its own root"


def test_unmerged_tokens_counts_each_leafs_path():
    beams = run(Shape(3, 3, 1))
    tree = pack(OPS, beams, ROOT, 14)
    for row in range(len(PROMPTS)):
        paths = node_paths(tree, row)
        leaves = [p for p in paths if not any(q[:-1] == p and q for q in paths)]
        assert int(unmerged_tokens(OPS, tree)[row]) == sum(len(p) + 1 for p in leaves)


def test_an_empty_pool_is_the_root_alone():
    tree = pack(OPS, no_beams(OPS, ROOT), ROOT, 64)
    assert tree.tokens.tolist() == [[t] for t in ROOT.tolist()]
    assert bool(tree.live.all())
    assert unmerged_tokens(OPS, tree).tolist() == [1, 1]


def test_dead_slots_are_not_live():
    beams = run(Shape(2, 2, 1, branching=2))
    score = torch.where(beams.depth == 2, DEAD, beams.score)
    tree = pack(OPS, beams._replace(score=score), ROOT, 64)
    assert torch.equal(tree.live, tree.depth < 2)
