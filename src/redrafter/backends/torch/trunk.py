"""The drafter's context trunk: causal layers over the text so far, run once per step over the newly accepted tokens.

A recurrent cell that sees only the last hidden state cannot look a name up that stood 40 tokens ago. The trunk can:
its layers attend over the (features, next token) pairs of the whole text, and their keys and values are kept between
steps. The cost is paid once per step, not once per drafted token (as EAGLE and Hydra++ do with one layer).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, rotated queries [B, H, T, d], rotated keys [B, Hkv, T, d], values) -> [B, H, T, d]: attention over whatever
is kept. Training attends within the text it is given."""


def rms(x: Tensor) -> Tensor:
    """Scale the last axis to root mean square 1, so that layers of different magnitude weigh alike."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotary(position_BT: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, width] of the rotary embedding, base 10,000."""
    half = torch.arange(0, width, 2, device=position_BT.device, dtype=torch.float32) / width
    angle = position_BT[..., None].float() * (10_000.0**-half)
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class TrunkLayer(nn.Module):
    """x + attention(rms x), then x + SwiGLU(rms x); ``heads`` = 0 leaves the attention out."""

    def __init__(self, width: int, heads: int, kv_heads: int, expansion: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        if heads:
            self.head_width = width // heads
            self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
            self.k_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
            self.v_proj = nn.Linear(width, kv_heads * self.head_width, bias=False)
            self.o_proj = nn.Linear(heads * self.head_width, width, bias=False)
        inner = int(width * expansion)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def attend(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        rows, length, _ = x.shape
        n = rms(x)

        def split(y: Tensor) -> Tensor:
            return y.view(rows, length, -1, self.head_width).transpose(1, 2)

        q, k, v = split(self.q_proj(n)), split(self.k_proj(n)), split(self.v_proj(n))
        y = attend(layer, rotate(q, *rope), rotate(k, *rope), v)
        return x + self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        if self.heads:
            x = self.attend(x, rope, attend, layer)
        n = rms(x)
        return x + self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


class Trunk(nn.Module):
    """[B, T, D] -> [B, T, D]. Without ``attend``, causal attention within T."""

    def __init__(self, layers: int, width: int, heads: int, kv_heads: int, expansion: float, window: int) -> None:
        super().__init__()
        self.window = window
        self.head_width = width // heads if heads else 0
        self.layers = nn.ModuleList(TrunkLayer(width, heads, kv_heads, expansion) for _ in range(layers))

    def forward(self, x: Tensor, position_BT: Tensor, attend: Attend | None = None) -> Tensor:
        rope = rotary(position_BT, self.head_width, x.dtype) if self.head_width else (x, x)
        if attend is None:
            limited = self.head_width and x.shape[1] > self.window
            attend = within(self.visible(position_BT, position_BT) if limited else None)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, attend, index)
        return x

    def visible(self, query_BT: Tensor, key_BS: Tensor) -> Tensor:
        """[B, 1, T, S] bool: which positions a query sees: its own and the ``window - 1`` before it."""
        distance = query_BT[:, :, None] - key_BS[:, None, :]
        return ((distance >= 0) & (distance < self.window))[:, None]


def within(mask: Tensor | None) -> Attend:
    """Attention over the keys and values it is given; ``mask`` [B, 1, T, S] bool, None is causal."""

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)

    return attend
