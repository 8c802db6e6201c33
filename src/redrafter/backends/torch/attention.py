"""Attention of tree nodes over the cache, registered with transformers under our own name.

On the CPU it works in float64. A node's keys lie in other slots, among other neighbours, than the same token's keys in
plain decoding, so a sum over slots runs in another order; in float64 that moves the result by 1e-16, which rounding to
bfloat16 or float32 removes (chance of one different bit per element about 1e-12 and 1e-8). That, and products that do
not depend on the number of rows (``linear.py``), make speculative logits equal plain ones bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from redrafter.errors import UnsupportedModel

EXACT = "redrafter_exact"
FAST = "redrafter_fast"
KERNEL = "redrafter_kernel"


def exact_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """query [B, H, N, d]; key, value [B, Hkv, S, d] float64; mask [B, 1, H/Hkv * N, S] float64, 0 or -inf."""
    refuse_sinks(settings)
    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    y = exact_scores(query, key, value, attention_mask, scaling, settings.get("softcap"))
    return y.view(query.shape[0], query.shape[2], query.shape[1], -1), None


def exact_scores(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """The same without transformers' wrapping: [B, N, H * d] in the query's dtype."""
    rows, heads, nodes, width = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    q = torch.empty(rows * kv_heads, heads // kv_heads * nodes, width, dtype=key.dtype, device=key.device)
    q.view(rows, heads, nodes, width).copy_(query)
    k, v = key.reshape(-1, slots, width), value.reshape(-1, slots, width)
    bias = mask.expand(-1, kv_heads, -1, -1).reshape(rows * kv_heads, -1, slots) if rows > 1 else mask[0]
    if softcap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.tanh((q @ k.transpose(1, 2)) * (scaling / softcap)).mul_(softcap) + bias
    y = torch.bmm(torch.softmax(scores, dim=-1), v).view(rows, heads, nodes, width)
    out = torch.empty(rows, nodes, heads, width, dtype=query.dtype, device=query.device)
    out.transpose(1, 2).copy_(y)
    return out.view(rows, nodes, heads * width)


def fast_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """The same through torch's own kernels; mask [B, 1, N, S] bool. Softcapping goes through the exact path."""
    refuse_sinks(settings)
    if settings.get("softcap") is not None:
        groups = query.shape[1] // key.shape[1]
        mask = torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill(~attention_mask, float("-inf"))
        mask = mask.repeat(1, 1, groups, 1)
        return exact_attention(module, query, key.float(), value.float(), mask, **settings)
    y = masked_attention(query, key, value, attention_mask, settings.get("scaling"))
    return y.transpose(1, 2).contiguous(), None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None) -> Tensor:
    """[B, H, N, d] through torch's own kernels, but not cuDNN's: those are compiled for every length of a prompt, and
    torch prefers them where heads share keys. So each head is given its own."""
    if query.device.type == "cuda":
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def kernel_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """A tree's nodes through our kernel, with a mask as ``kernels.state.place_nodes`` makes it; with one of bools the
    fast path."""
    if attention_mask.dtype == torch.bool:
        return fast_attention(module, query, key, value, attention_mask, **settings)
    from redrafter.backends.torch.kernels.attention import tree_attention  # needs triton

    refuse_sinks(settings)
    rows, heads, nodes, width = query.shape
    scaling = settings.get("scaling") or width**-0.5
    lengths_B, words, at_B = mask_parts(attention_mask)
    y = tree_attention(query, key, value, lengths_B, words, scaling, settings.get("softcap"), at_B=at_B)
    return y.view(rows, nodes, heads, width), None


def refuse_sinks(settings: dict[str, Any]) -> None:
    if settings.get("s_aux") is not None:
        raise UnsupportedModel("attention sinks (s_aux) change the softmax and are not supported: use another model")


AttentionInterface.register(EXACT, exact_attention)
AttentionInterface.register(FAST, fast_attention)
AttentionInterface.register(KERNEL, kernel_attention)


def mask_for(visible_BNS: Tensor, groups: int, exact: bool) -> Tensor:
    """The 4-D mask that transformers hands through: bool for the fast path, additive float64 for the exact."""
    if not exact:
        return visible_BNS[:, None]
    mask = torch.zeros(visible_BNS.shape, dtype=torch.float64, device=visible_BNS.device)
    return mask.masked_fill_(~visible_BNS, float("-inf"))[:, None].repeat(1, 1, groups, 1)


def chain_mask(tokens: int, start_B: Tensor, row_B: Tensor) -> Tensor:
    """What the kernel takes for tokens that follow each other, [B, 1, T, 4]: ancestor words, how many tokens are before
    them, the row of the cache."""
    from redrafter.backends.torch.kernels.attention import ancestor_words  # needs triton

    words = ancestor_words(torch.ones(1, tokens, tokens, dtype=torch.bool, device=start_B.device).tril())
    ends = torch.stack([start_B, row_B], dim=1)[:, None].expand(-1, tokens, 2)
    return torch.cat([words.expand(len(start_B), -1, -1), ends], dim=2)[:, None]


def mask_parts(mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(lengths [B], ancestor words [B, N, 2 or more], rows of the cache [B] if the mask names them)."""
    return mask[:, 0, 0, 2], mask[:, 0], mask[:, 0, 0, 3] if mask.shape[3] > 3 else None
