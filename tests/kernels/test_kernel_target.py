"""A target on kernels against the same one on torch's own attention: tiny models of several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.attention import FAST, KERNEL
from redrafter.backends.torch.target import TorchTarget
from tests.kernels.test_kernels_attention import random_masks
from tests.tiny import VOCAB, make_model

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.attention import ancestor_words

PROMPT = torch.arange(3, 14)


def random_tree(nodes: int, bits: bool) -> TokenTree:
    mask = random_masks(2, nodes, seed=nodes)
    tokens = torch.randint(3, VOCAB, (2, nodes), generator=torch.Generator().manual_seed(nodes))
    words = ancestor_words(mask) if bits else None
    return TokenTree(tokens, torch.zeros_like(tokens), mask.sum(2) - 1, mask, torch.ones_like(tokens) > 0, words)


def read(model: Any, trees: list[TokenTree]) -> list[Tensor]:
    """Two rows of different lengths; after every tree its nodes 0, 2, 5 are kept: logits and features of all."""
    target = TorchTarget(model, (0, 1))
    target.cache.reserve(2, 170)
    target.prefill(0, PROMPT, 0)
    target.prefill(1, PROMPT[:4], 0)
    target.prefill(1, PROMPT[4:6], 4)
    lengths, results = torch.tensor([11, 6]), []
    for tree in trees:
        results.extend(target.verify(tree, lengths))
        path = torch.tensor([[0, 2, 5], [0, 1, 2]]).clamp(max=tree.tokens.shape[1] - 1)
        two = torch.tensor([2, 2])
        target.commit(lengths, Accepted(path, two, two, path, two > 0))
        lengths = lengths + 3
    return results


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_attention_and_cache(family: str) -> None:
    trees = [random_tree(6, True), random_tree(1, False), random_tree(12, False)]
    expected = read(make_model(family, FAST), trees)
    got = read(make_model(family, KERNEL), trees)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_a_tree_with_more_nodes_than_bits_takes_torchs_attention() -> None:
    trees = [random_tree(130, False)]
    for a, b in zip(read(make_model("llama", KERNEL), trees), read(make_model("llama", FAST), trees), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
