"""Fused layers against transformers' own, of a verified tree and of a prompt."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.attention import FAST, KERNEL
from redrafter.backends.torch.target import TorchTarget
from tests.kernels.test_kernel_target import PROMPT, random_tree, read
from tests.tiny import make_model

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels import layer as layer_module
from redrafter.backends.torch.kernels.layer import FusedCudaLayer, KernelHead, fuse_cuda_layers
from redrafter.backends.torch.kernels.matmul import Workspace
from redrafter.backends.torch.kernels.stream import MAX_ROWS

ONE = torch.ones(1, 1, dtype=torch.bool)
TREES = [random_tree(4, True), random_tree(1, False)]


def compare(fused: object, twin: object, trees: list) -> None:
    for a, b in zip(read(fused, trees), read(twin, trees), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_fused_layer_computes_what_its_twin_computes(family: str, streams: bool) -> None:
    twin, fused = make_model(family, FAST), make_model(family, KERNEL)
    for model in (twin, fused):
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(p, 1, 0.3, generator=torch.Generator().manual_seed(len(name)))
    assert fuse_cuda_layers(fused) == 3
    for layer in fused.base_model.layers:
        assert isinstance(layer, FusedCudaLayer)
        layer.most_streamed = MAX_ROWS if streams else 0
    compare(fused, twin, TREES)


def test_one_row() -> None:
    """Plain decoding of one request takes other products than several rows do."""
    results = []
    for attention in (KERNEL, FAST):
        model = make_model("qwen3", attention)
        fuse_cuda_layers(model)
        target = TorchTarget(model, (0, 1))
        target.cache.reserve(1, 40)
        target.prefill(0, PROMPT, 0)
        for i, token in enumerate((5, 9)):
            tree = TokenTree(*(torch.full((1, 1), x) for x in (token, 0, 0)), ONE[None], ONE)
            results.append(target.verify(tree, torch.tensor([len(PROMPT) + i])))
    for got, expected in zip(results[:2], results[2:], strict=True):
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_what_has_another_structure_is_left_alone() -> None:
    assert fuse_cuda_layers(make_model("gemma2", KERNEL)) == 0
    assert fuse_cuda_layers(make_model("llama", KERNEL, mlp_bias=True)) == 0
    assert fuse_cuda_layers(make_model("llama", KERNEL, hidden_act="gelu")) == 0
    assert fuse_cuda_layers(make_model("llama", FAST)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (5, 13)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_heads_product(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(40, 70, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, 40)
    y = KernelHead(head, Workspace(torch.device("cpu"), 1 << 16, 64))(x)
    torch.testing.assert_close(y, head(x), rtol=1e-5, atol=1e-5)


def test_a_head_is_replaced_where_ours_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "WIDE_HEAD", 16)
    for half in (False, True):
        model = make_model("llama", KERNEL)
        model = model.half() if half else model
        weight = model.lm_head.weight
        fuse_cuda_layers(model)
        assert isinstance(model.lm_head, KernelHead) == half and model.get_output_embeddings().weight is weight
