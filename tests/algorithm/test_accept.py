"""Acceptance against a walk: from the root, follow what the target chose for as long as it was drafted."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import OPS

from redrafter.algorithm.accept import Choice, accept, choose
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.tree import TokenTree, ancestor_mask

V = 4


def random_tree(rng: random.Random, nodes: int, depths: int) -> TokenTree:
    """Parents first, siblings distinct, no deeper than ``depths - 1``; some nodes dead."""
    tokens, parent, depth, used = [rng.randrange(V)], [0], [0], set()
    while len(tokens) < nodes:
        free = [(p, t) for p in range(len(tokens)) for t in range(V) if depth[p] < depths - 1 and (p, t) not in used]
        if not free:
            break
        p, t = rng.choice(free)
        used.add((p, t))
        tokens.append(t)
        parent.append(p)
        depth.append(depth[p] + 1)
    live = [True] + [rng.random() < 0.9 for _ in tokens[1:]]
    parents = torch.tensor([parent])
    mask = ancestor_mask(OPS, parents, len(tokens))
    return TokenTree(torch.tensor([tokens]), parents, torch.tensor([depth]), mask, torch.tensor([live]))


def walk(tree: TokenTree, chosen: list[int]) -> tuple[list[int], int]:
    node, path = 0, [0]
    while True:
        step = [
            child
            for child in range(1, tree.tokens.shape[1])
            if int(tree.parent[0, child]) == node and int(tree.tokens[0, child]) == chosen[node] and tree.live[0, child]
        ]
        if not step:
            return path, chosen[node]
        (node,) = step
        path.append(node)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 24), st.integers(2, 6))
def test_accept_is_the_sequential_walk(seed, nodes, depths):
    rng = random.Random(seed)
    tree = random_tree(rng, nodes, depths)
    # Half of the choices lead to a child that exists, so that long paths occur.
    chosen = []
    for node in range(tree.tokens.shape[1]):
        children = [c for c in range(1, tree.tokens.shape[1]) if int(tree.parent[0, c]) == node]
        follow = children and rng.random() < 0.7
        chosen.append(int(tree.tokens[0, rng.choice(children)]) if follow else rng.randrange(V))
    accepted = accept(OPS, tree, Choice(torch.tensor([chosen]), torch.ones_like(tree.live)), depths)
    path, bonus = walk(tree, chosen)
    length = len(path) - 1
    drafted = [int(tree.tokens[0, node]) for node in path[1:]]
    assert int(accepted.length) == length
    assert accepted.path[0].tolist() == path + [path[-1]] * (depths - len(path))
    assert int(accepted.bonus) == bonus
    assert accepted.tokens[0].tolist() == drafted + [bonus] * (depths - length)


def chain(tokens: list[int]) -> TokenTree:
    n = len(tokens)
    parent = torch.tensor([[0, *range(n - 1)]])
    mask = ancestor_mask(OPS, parent, n)
    return TokenTree(torch.tensor([tokens]), parent, torch.arange(n)[None], mask, torch.ones(1, n, dtype=torch.bool))


def logits_choosing(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([tokens]), V).float()


def test_not_finite_on_the_path_is_reported_and_elsewhere_is_not():
    tree = chain([0, 1, 2, 3])
    for bad in (float("nan"), float("inf")):
        logits = logits_choosing([1, 2, 0, 0])  # two accepted; node 3 is not on the path
        elsewhere, on_path = logits.clone(), logits.clone()
        elsewhere[0, 3, 1] = bad
        on_path[0, 1, 3] = bad
        greedy = Sampling()
        assert accept(OPS, tree, choose(OPS, elsewhere, tree, greedy, None), 4).finite.tolist() == [True]
        assert accept(OPS, tree, choose(OPS, on_path, tree, greedy, None), 4).finite.tolist() == [False]


def test_every_token_excluded_is_reported():
    tree = chain([0])
    sampling = Sampling(bias=torch.full((1, V), -torch.inf))
    assert accept(OPS, tree, choose(OPS, torch.zeros(1, 1, V), tree, sampling, None), 1).finite.tolist() == [False]


def test_greedy_rows_of_a_sampling_batch_see_no_noise():
    tree = chain([0])
    rows = TokenTree(*(x.expand(2, *x.shape[1:]) for x in tree[:5]))
    sampling = Sampling(inverse_temperature=torch.tensor([0.0, 1.0]))
    noise = torch.tensor([0.0, 0.0, 9.0, 0.0]).expand(2, 1, V)
    choice = choose(OPS, logits_choosing([1]).expand(2, 1, V), rows, sampling, noise)
    assert choice.token.tolist() == [[1], [2]]


def test_ties_go_to_the_lowest_id():
    choice = choose(OPS, torch.zeros(1, 1, V), chain([0]), Sampling(), None)
    assert choice.token.tolist() == [[0]]
