"""Fused layers against transformers' own: the same numbers to rounding, and only where the structure is known."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch.attention import EXACT, FAST
from redrafter.backends.torch.fused import FusedLayer, fuse_layers
from redrafter.backends.torch.linear import can_pack
from redrafter.backends.torch.target import TorchTarget
from tests.tiny import VOCAB, make_model

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32, torch.device("cpu")), reason="this CPU or torch build has no packed product"
)
KNOWN = {"llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}}


def features(model: object, ids: torch.Tensor) -> torch.Tensor:
    target = TorchTarget(model, (0, 1))
    target.cache.reserve(1, len(ids))
    return target.prefill(0, ids, 0)


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_fused_layer_computes_what_its_twin_computes(family: str, dtype: torch.dtype, tolerance: float) -> None:
    if not can_pack(dtype, torch.device("cpu")):
        pytest.skip(f"this CPU has no packed product in {dtype}")
    ids = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(1))
    twin, fused = make_model(family).to(dtype), make_model(family).to(dtype)
    assert fuse_layers(fused) == 3
    assert all(isinstance(layer, FusedLayer) for layer in fused.base_model.layers)
    expected, got = features(twin, ids).float(), features(fused, ids).float()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_attention_biases_are_kept() -> None:
    ids = torch.arange(3, 20)
    models = [make_model("llama", attention_bias=True) for _ in range(2)]
    for model in models:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.constant_(p, 0.3)
    expected = features(models[0], ids)
    assert fuse_layers(models[1]) == 3
    torch.testing.assert_close(features(models[1], ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2", "mixtral", "cohere"])
def test_other_structures_are_left_alone(family: str) -> None:
    assert fuse_layers(make_model(family)) == 0


def test_another_activation_or_attention_is_left_alone() -> None:
    assert fuse_layers(make_model("llama", hidden_act="gelu")) == 0
    assert fuse_layers(make_model("llama", FAST)) == 0
    assert make_model("llama").config._attn_implementation == EXACT
