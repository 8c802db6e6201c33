"""What stands between a layer's products: rotary embedding with the cache write, norm with residual, gate.

The eager twins are transformers' own modules. bfloat16 and float16 are rounded where transformers rounds them.

Letters: B rows, N tokens, M = B x N, H heads, Hkv KV heads, d head width, D hidden width, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.matmul import gated_by
from redrafter.backends.torch.kernels.rotate import Rotation, turned
from redrafter.backends.torch.kernels.tall import tall


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 rounded to ``dtype`` and back."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rope_write(
    qkv, q_gain, k_gain, q, eps,
    cos, sin, slots, keys, values, tokens, cos_row, cos_token, slot_row, cache_row, cache_head, cache_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr,
    TOGETHER: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes TOGETHER of the q, k and v heads of one token."""
    start_early(EARLY)
    dtype = q.dtype.element_ty
    token = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
    column, pair = tl.arange(0, WIDTH_P)[None, :], tl.arange(0, WIDTH_P // 2)[None, :]
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    real, real_pair = column < WIDTH, pair < WIDTH // 2
    m = row * tokens + token
    start = qkv + m * ((HEADS + 2 * KV_HEADS) * WIDTH) + head * WIDTH
    raw = tl.load(start + column, mask=(is_q | is_k | is_v) & real, other=0.0)
    x = raw.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
        gain = tl.load(tl.where(is_q, q_gain + column, k_gain + column), mask=real, other=0.0).to(tl.float32)
        x = _rounded(_rounded(x * scale, dtype) * gain, dtype)
    angle = row * cos_row + token * cos_token + pair
    c = tl.load(cos + angle, mask=real_pair, other=0.0)
    s = tl.load(sin + angle, mask=real_pair, other=0.0)
    y = turned(x, c, s, dtype, TOGETHER, WIDTH_P)
    tl.store(q + (m * HEADS + head) * WIDTH + column, y, mask=is_q & real)
    to = row * cache_row + tl.load(slots + row * slot_row + token) * cache_slot + column
    tl.store(keys + to + (head - HEADS).to(tl.int64) * cache_head, y.to(keys.dtype.element_ty), mask=is_k & real)
    to_value = to + (head - HEADS - KV_HEADS).to(tl.int64) * cache_head
    tl.store(values + to_value, raw.to(values.dtype.element_ty), mask=is_v & real)


class HeadNorms(NamedTuple):
    """Norms over each head's width before the rotation, as Qwen3 has them; weights in the order of the heads."""

    q: Tensor  # [d]
    k: Tensor  # [d]
    eps: float


def rope_write(qkv: Tensor, rotation: Rotation, norms: HeadNorms | None = None) -> Tensor:
    """The rotated queries [B, H, N, d], a view of [B, N, H, d]; rotated keys, and values, go to the cache.

    ``qkv`` [B, N, (H + 2 Hkv) * d] contiguous, q first, then k, v; the halves of q's and k's heads, and so those of the
    norms' weights, are interleaved (``rotate.interleaved``), and stay so.
    """
    rows, tokens, size = qkv.shape
    assert qkv.is_contiguous()
    turned, (heads, kv_heads, width) = rotation.arguments(size)
    q = torch.empty(rows, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    width_padded = triton.next_power_of_2(width)
    together = max(1, 1024 // width_padded)
    q_gain, k_gain, eps = norms or (qkv, qkv, 0.0)
    _rope_write[(tokens, rows, triton.cdiv(heads + 2 * kv_heads, together))](
        qkv, q_gain, k_gain, q, eps, *turned,
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, WIDTH_P=width_padded, TOGETHER=together,
        NORM=norms is not None, num_warps=4, enable_fp_fusion=False, **early(qkv),
    )  # fmt: skip
    return q.transpose(1, 2)


@triton.jit
def _add_rms_norm(
    x, delta, gain, total, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    start_early(EARLY)
    dtype = x.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = _rounded(value + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(total + place, value.to(dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    weight = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, (_rounded(value * scale, dtype) * weight).to(dtype), mask=inside)


def add_rms_norm(x_MD: Tensor, delta_MD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm times the weight); without ``delta`` x itself and its norm. Contiguous."""
    width = x_MD.shape[-1]
    assert x_MD.is_contiguous() and (delta_MD is None or delta_MD.is_contiguous())
    normed = tall(x_MD.shape, x_MD)
    total = x_MD if delta_MD is None else torch.empty_like(x_MD)
    _add_rms_norm[(x_MD.numel() // width,)](
        x_MD, x_MD if delta_MD is None else delta_MD, weight_D, total, normed, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=delta_MD is not None,
        num_warps=8 if width > 2048 else 4, **early(x_MD),
    )  # fmt: skip
    return total, normed


@triton.jit
def _silu_mul(gate_up, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    dtype = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    x = tl.load(gate_up + row * 2 * WIDTH + both, mask=both < 2 * WIDTH, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(x, (BLOCK, 2)))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * WIDTH + column, gated_by(gate, up, dtype).to(dtype), mask=column < WIDTH)


def silu_mul(gate_up_MF: Tensor) -> Tensor:
    """silu(gate) * up of [M, 2 F], gates and ups in turn: [M, F]."""
    rows, double = gate_up_MF.shape
    assert gate_up_MF.is_contiguous()
    y = torch.empty(rows, double // 2, dtype=gate_up_MF.dtype, device=gate_up_MF.device)
    _silu_mul[(rows, triton.cdiv(double // 2, 1024))](gate_up_MF, y, WIDTH=double // 2, BLOCK=1024, num_warps=4)
    return y
