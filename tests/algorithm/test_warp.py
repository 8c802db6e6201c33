"""Sampling settings against a numpy loop and transformers' logits processors, every node on its own path."""

from __future__ import annotations

import random

import numpy as np
import pytest
import slow
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import DEFAULTS, OPS, sampling_of
from test_accept import random_tree

from redrafter.algorithm.sampling import Sampling, warp
from redrafter.algorithm.tree import TokenTree

V = 4  # the vocabulary of random_tree


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    """Root to node."""
    return [int(tree.tokens[0, j]) for j in range(tree.tokens.shape[1]) if tree.mask[0, node, j]]


def random_settings(rng: random.Random) -> dict:
    def maybe(value):
        return value if rng.random() < 0.5 else None

    chosen = {
        "temperature": maybe(rng.choice([0.0, 0.3, 0.9, 2.0])),
        "top_k": maybe(rng.randint(1, V + 1)),
        "top_p": maybe(rng.uniform(0.05, 1.0)),
        "min_p": maybe(rng.uniform(0.01, 0.9)),
        "repetition": maybe(rng.uniform(0.5, 2.0)),
        "presence": maybe(rng.uniform(-1, 1)),
        "frequency": maybe(rng.uniform(-1, 1)),
        "bias": maybe([rng.choice([0.0, 1.5, -2.0, -float("inf")]) for _ in range(V - 1)] + [0.0]),
    }
    return {**DEFAULTS, **{k: v for k, v in chosen.items() if v is not None}}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_every_node_with_its_own_path_against_the_numpy_loop(seed):
    rng = random.Random(seed)
    tree = random_tree(rng, rng.randint(1, 14), 5)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, tree.tokens.shape[1], V))).float() * 2
    prompt = [rng.randrange(V) for _ in range(rng.randint(0, 4))]
    root = int(tree.tokens[0, 0])
    s = random_settings(rng)
    ours = warp(OPS, logits, tree, sampling_of([s], [[*prompt, root]], V))[0].double().numpy()
    for node in range(tree.tokens.shape[1]):
        expected = slow.warp(logits[0, node].numpy(), prompt, path_tokens(tree, node), s)
        assert np.array_equal(np.isinf(ours[node]), np.isinf(expected)), (s, node)
        np.testing.assert_allclose(ours[node], expected, rtol=1e-5, atol=1e-5)


def transformers_processors(s: dict) -> transformers.LogitsProcessorList:
    """In the order in which transformers builds them."""
    processors = transformers.LogitsProcessorList()
    if s["bias"] is not None:
        bias = {(i,): b for i, b in enumerate(s["bias"])}
        processors.append(transformers.SequenceBiasLogitsProcessor(bias))
    processors.append(transformers.RepetitionPenaltyLogitsProcessor(s["repetition"]))
    processors.append(transformers.TemperatureLogitsWarper(s["temperature"]))
    if s["top_k"]:
        processors.append(transformers.TopKLogitsWarper(s["top_k"]))
    processors.append(transformers.TopPLogitsWarper(s["top_p"]))
    processors.append(transformers.MinPLogitsWarper(s["min_p"]))
    return processors


@pytest.mark.parametrize("seed", range(40))
def test_against_transformers(seed):
    rng = random.Random(seed)
    tree = random_tree(rng, 8, 4)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, tree.tokens.shape[1], V, generator=generator) * 2
    prompt = [rng.randrange(V) for _ in range(3)]
    s = {**random_settings(rng), "presence": 0.0, "frequency": 0.0}  # transformers has neither
    s["temperature"] = s["temperature"] or 1.0
    s["bias"] = None if s["bias"] is None else [max(b, -3.0) for b in s["bias"]]
    ours = warp(OPS, logits, tree, sampling_of([s], [[*prompt, int(tree.tokens[0, 0])]], V))
    for node in range(tree.tokens.shape[1]):
        ids = torch.tensor([prompt + path_tokens(tree, node)])
        expected = transformers_processors(s)(ids, logits[:, node])
        torch.testing.assert_close(ours[:, node], expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_on_by_default():
    tree = random_tree(random.Random(1), 6, 4)
    logits = torch.randn(1, tree.tokens.shape[1], V)
    assert torch.equal(warp(OPS, logits, tree, Sampling()), logits)
    neutral = sampling_of([{}], [[0, int(tree.tokens[0, 0])]], V)
    assert torch.equal(warp(OPS, logits, tree, neutral), logits)


def test_equal_logits_at_the_cut_stay_together():
    tree = random_tree(random.Random(1), 1, 2)
    logits = torch.tensor([[[1.0, 2.0, 1.0, 0.0]]])
    kept = warp(OPS, logits, tree, Sampling(top_k=torch.tensor([2])))
    assert torch.isfinite(kept)[0, 0].tolist() == [True, True, True, False]


def test_the_most_likely_token_is_never_cut():
    tree = random_tree(random.Random(1), 1, 2)
    logits = torch.tensor([[[1.0, 2.0, 1.0, 0.0]]])
    tiny = Sampling(top_k=torch.tensor([1]), top_p=torch.tensor([1e-9]), log_min_p=torch.tensor([0.0]))
    assert torch.isfinite(warp(OPS, logits, tree, tiny))[0, 0].tolist() == [False, True, False, False]


def test_top_p_off_cuts_nothing_beside_a_row_that_uses_it():
    """In float32 the running sum of probabilities reaches 1 before the tail, which must not depend on the batch."""
    tree = random_tree(random.Random(1), 1, 2)
    rows = TokenTree(*(x.expand(2, *x.shape[1:]) for x in tree[:5]))
    logits = torch.tensor([30.0, 0.0, -1.0, -2.0]).expand(2, 1, V)
    kept = warp(OPS, logits, rows, Sampling(top_p=torch.tensor([1.0, 0.5])))
    assert torch.isfinite(kept)[:, 0].tolist() == [[True] * 4, [True, False, False, False]]
