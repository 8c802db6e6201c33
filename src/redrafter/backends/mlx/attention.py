"""A layer's attention with few launches: one product for queries, keys and values, one rotation for all of them.

On a small model a step's time is the launches, so what mlx-lm does in three products, two rotations and two writes is
done in one of each. The weights stay one array: mlx-lm's own linears become views of it. Vectors lie under one another,
[B N, D]: with an axis for the rows and one for the nodes every product would reshape on its way in and out, and such
operations, which compute nothing, take the host too (42 operations a layer that way, 21 this way).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter.backends.mlx.kv_cache import KVCache
from redrafter.backends.mlx.ops import constant

Product = Callable[[mx.array], mx.array]
Sum = Callable[[mx.array, mx.array], mx.array]
UNSCALED = ("RoPE", "Llama3RoPE")
"""Rotary modules that leave a vector at position 0 as it is."""
MAX_ROTATED = 32_768
"""Vectors per rotation: they lie on an axis that CUDA counts to 65,535."""


class Attention:
    """``attention``: a self-attention module of mlx-lm's Llama, Qwen 2 or Qwen 3.

    ``side_by_side``: a single node's query heads that share keys become rows of one query, and a lone head two equal
    rows: CUDA has a fused kernel with a mask for several rows only.
    """

    def __init__(self, attention: Any, side_by_side: bool) -> None:
        self.module = attention
        self.side_by_side = side_by_side
        self.heads, self.kv_heads = attention.n_heads, attention.n_kv_heads
        self._qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._normed = "q_norm" in attention
        self._rotate_values = type(attention.rope).__name__ in UNSCALED

    def offsets(self, position_BN: mx.array) -> mx.array:
        """What the rotation of every vector starts from, [B N heads] int32: values are rotated by nothing."""
        return offsets(position_BN, self.heads + self.kv_heads, self.kv_heads if self._rotate_values else 0)

    def mask(self, visible_BNS: mx.array, dtype: mx.Dtype) -> mx.array:
        """[B, 1, rows of a query, S]: what to add to the scores."""
        mask = additive(visible_BNS, dtype)
        if self.side_by_side and mask.shape[1] == 1:
            mask = mx.contiguous(mx.broadcast_to(mask, (mask.shape[0], max(2, self._group), mask.shape[2])))
        return mask[:, None]

    @property
    def _group(self) -> int:
        return self.heads // self.kv_heads

    def __call__(self, x: mx.array, offset: mx.array, mask: mx.array | None, cache: KVCache, layer: int) -> mx.array:
        """[B N, D] -> [B N, heads x d], before the output's product; keys and values go where the cache was told.
        Without a mask all slots are seen."""
        nodes, width = cache.nodes, cache.head_width
        rows = x.shape[0] // nodes
        y = self._turned(self._qkv(x), offset, width).reshape(rows, nodes, -1, width)
        keys, values = cache.write(layer, y[:, :, self.heads :])
        q = y[:, :, : self.heads].transpose(0, 2, 1, 3)
        scale = self.module.scale
        if self.side_by_side and nodes == 1 and mask is not None:
            q = q.reshape(rows, self.kv_heads, self._group, -1)
            q = mx.concatenate([q, q], axis=2) if self._group == 1 else q
            out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
            return out[:, :, : self._group].reshape(rows, -1)
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
        return out.transpose(0, 2, 1, 3).reshape(rows * nodes, -1)

    def _turned(self, y: mx.array, offset: mx.array, width: int) -> mx.array:
        """[B N, heads x width] with its queries and keys normed, if the family norms them, and rotated; any shape."""
        turned = self.heads + self.kv_heads
        if not self._normed and self._rotate_values:
            return rotate(self.module.rope, y, offset, width)
        y = y.reshape(y.shape[0], -1, width)
        if self._normed:
            q = self.module.q_norm(y[:, : self.heads])
            k = self.module.k_norm(y[:, self.heads : turned])
            y = mx.concatenate([q, k, y[:, turned:]], axis=1)
        if self._rotate_values:
            return rotate(self.module.rope, y, offset, width)
        first = rotate(self.module.rope, y[:, :turned], offset, width).reshape(-1, turned, width)
        return mx.concatenate([first, y[:, turned:]], axis=1)


def offsets(position_BN: mx.array, turned: int, still: int) -> mx.array:
    """[B N (turned + still)] int32: for ``rotate``, of which each token's first vectors are turned."""
    position = position_BN.reshape(-1, 1)
    offset = mx.broadcast_to(position, (position.shape[0], turned))
    if still:
        offset = mx.concatenate([offset, constant((position.shape[0], still), 0, mx.int32)], axis=1)
    return offset.reshape(-1)


def rotate(rope: Callable[..., mx.array], y: mx.array, offset: mx.array, width: int) -> mx.array:
    """Every vector of ``width`` numbers from its own position: [vectors, 1, 1, width]. A rotary function takes one
    offset per entry of the first axis: vectors go on that axis."""
    flat = y.reshape(-1, 1, 1, width)
    if flat.shape[0] <= MAX_ROTATED:
        return rope(flat, offset=offset)
    parts = range(0, flat.shape[0], MAX_ROTATED)
    return mx.concatenate([rope(flat[i : i + MAX_ROTATED], offset=offset[i : i + MAX_ROTATED]) for i in parts])


def adding(linear: nn.Module) -> Sum:
    """(residual, x), both [vectors, ..] -> residual + linear(x), for several vectors by the product itself: one launch
    less. A lone one has a faster kernel that adds nothing."""
    if type(linear) is not nn.Linear or "bias" in linear:
        return lambda residual, x: residual + linear(x)
    transposed = linear.weight.T
    mx.eval(transposed)
    return lambda residual, x: residual + x @ transposed if x.shape[0] == 1 else mx.addmm(residual, x, transposed)


def additive(visible: mx.array, dtype: mx.Dtype) -> mx.array:
    """0 where a query may look and a number that no score outweighs elsewhere: not -inf, since a fused kernel may meet
    a whole block of those before it meets a score, and subtract infinities."""
    lowest = -6.0e4 if dtype == mx.float16 else -1.0e30
    return mx.where(visible, mx.array(0.0, dtype), mx.array(lowest, dtype))


class GatedMLP:
    """A SwiGLU, mlx-lm's or the drafter's, with one product for gate and up; what its ``down_proj`` is given."""

    def __init__(self, mlp: Any) -> None:
        self._both = joined([mlp.gate_proj, mlp.up_proj])

    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(*mx.split(self._both(x), 2, axis=-1))


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def joined(linears: Sequence[nn.Module]) -> Product:
    """x [..., in] -> what the linears say of it, one after the other [..., sum of outs], by one product.

    Where they are of different kinds (a mixed quantisation), each computes its own.
    """
    how_stored = ("bits", "group_size", "mode")
    kinds = {(type(x), x.get("bias") is None, *(getattr(x, name, None) for name in how_stored)) for x in linears}
    if len(kinds) > 1 or not isinstance(linears[0], nn.Linear | nn.QuantizedLinear):
        return lambda x: mx.concatenate([linear(x) for linear in linears], axis=-1)
    names = [n for n in ("weight", "scales", "biases", "bias") if linears[0].get(n) is not None]
    whole = {name: mx.concatenate([linear[name] for linear in linears]) for name in names}
    mx.eval(whole)
    at = 0
    for linear in linears:
        size = linear["weight"].shape[0]
        for name in names:
            linear[name] = whole[name][at : at + size]
        mx.eval([linear[name] for name in names])
        at += size
    first, bias = linears[0], whole.get("bias")
    if isinstance(first, nn.QuantizedLinear):
        how = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}

        def quantised(x: mx.array) -> mx.array:
            y = mx.quantized_matmul(x, whole["weight"], whole["scales"], whole.get("biases"), transpose=True, **how)
            return y if bias is None else y + bias

        return quantised
    transposed = whole["weight"].T
    mx.eval(transposed)
    return (lambda x: x @ transposed) if bias is None else (lambda x: mx.addmm(bias, x, transposed))
