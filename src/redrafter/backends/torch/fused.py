"""Decoder layers of the Llama kind with fewer, larger operations: the CPU's fast path.

A forward of a small model through transformers' modules is mostly Python and dispatch (measured on two cores,
SmolLM2-135M, one row: 38 ms, of which the weights' bytes account for 13). ``fuse_layers`` swaps a layer of exactly
the structure below for one that multiplies q|k|v and gate|up as one product each. The swapped layer's slow twin is
transformers' own (tests/backends/test_fused.py).

    x + o(attention(rope(norm_q q(n)), rope(norm_k k(n)), v(n)))   n = rms(x)
    x + down(silu(gate(n)) * up(n))                                 n = rms(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.backends.torch.attention import EXACT, exact_scores
from redrafter.backends.torch.kv_cache import KVCache
from redrafter.backends.torch.linear import PackedLinear, can_pack

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' classes that compute exactly the two lines above."""


def fuse_layers(model: Any) -> int:
    """Swap every layer that can be; returns how many were. The model's attention must be the exact one."""
    if model.config._attn_implementation != EXACT:
        return 0
    layers = model.base_model.layers
    swapped = 0
    for index, layer in enumerate(layers):
        weight = next(layer.parameters())
        if type(layer).__name__ in LAYERS and can_pack(weight.dtype, weight.device) and is_silu(layer.mlp.act_fn):
            layers[index] = FusedLayer(layer)
            swapped += 1
    return swapped


def is_silu(activation: Any) -> bool:
    return activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def _join(*linears: Any) -> PackedLinear:
    """One product for several with the same input."""
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases)
    return PackedLinear(torch.cat([linear.weight for linear in linears]), bias)


class Norm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FusedLayer(nn.Module):
    """Takes the place of a transformers decoder layer inside its model; called as that one is."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self.width: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.q_norm = Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.kv_heads = attention.k_proj.out_features // self.width
        self.heads = attention.q_proj.out_features // self.width
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj.weight, mlp.down_proj.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        past_key_values: KVCache | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. transformers names the cache ``past_key_values``, in newer releases ``cache``."""
        store = past_key_values if cache is None else cache
        assert store is not None
        x = hidden_states + self.attend(self.input_norm(hidden_states), attention_mask, position_embeddings, store)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate).mul_(up))

    def attend(self, n: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor], store: KVCache) -> Tensor:
        rows, nodes, _ = n.shape
        qkv = self.qkv(n).view(rows, nodes, -1, self.width)
        rotated, values = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rotated.split([self.heads, self.kv_heads], dim=2)
            rotated = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        cos, sin = (t[:, :, None] for t in rope)
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
        q, k = rotated.split([self.heads, self.kv_heads], dim=2)
        keys, values = store.update(k.transpose(1, 2), values.transpose(1, 2), self.layer_idx)
        y = exact_scores(q.transpose(1, 2), keys, values, mask, self.scaling)
        return self.out(y)
