"""Rotation with the cache write, norm with residual, gate: against transformers' and torch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from redrafter.backends.torch.kv_cache import KVCache
from tests.kernels.twins import in_pairs, random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.commit import KernelCache
from redrafter.backends.torch.kernels.norms import HeadNorms, add_rms_norm, rope_write, silu_mul
from redrafter.backends.torch.kernels.rotate import Rotation

EXACTLY = {torch.float32: 2e-6, torch.float16: 1e-3}
"""One rounding: of float16 at magnitude 1 to 2, where fused multiply-adds or another order of a sum move a tie."""


def rms(x: Tensor, gain: Tensor) -> Tensor:
    norm = LlamaRMSNorm(len(gain), 1e-5)
    norm.weight = torch.nn.Parameter(gain)
    return norm(x)


def nearly_all_equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=EXACTLY[a.dtype], atol=EXACTLY[a.dtype])
    assert a.dtype == torch.float32 or (a == b).float().mean() > 0.98


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", list(EXACTLY))
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 24), (9, 3, 64)])
def test_rope_write(
    heads: int, kv_heads: int, width: int, dtype: torch.dtype, normed: bool, device: torch.device
) -> None:
    qkv = random(2, 3, (heads + 2 * kv_heads) * width, seed=1).to(device, dtype)
    angle = random(2, 3, width // 2, seed=2).to(device)
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angle.cos(), angle.sin()))
    gains = [(1 + 0.3 * random(width, seed=s)).to(device, dtype) for s in (3, 4)]
    slots = torch.tensor([[4, 9, 2], [7, 8, 30]], device=device)
    eager, kernel = (kind(2, kv_heads, width, dtype, device) for kind in (KVCache, KernelCache))
    for cache in (eager, kernel):
        cache.reserve(3, 40)
        cache.place(1, slots, 40)
    q, k, v = (x.unflatten(2, (-1, width)) for x in qkv.split([n * width for n in (heads, kv_heads, kv_heads)], 2))
    if normed:
        q, k = rms(q, gains[0]), rms(k, gains[1])
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    q, k = (in_pairs(x) for x in (q, k))
    eager.update(k, v.transpose(1, 2), 1)
    norms = HeadNorms(in_pairs(gains[0]), in_pairs(gains[1]), 1e-5) if normed else None
    rotated = (heads + kv_heads) * width
    qkv = torch.cat([in_pairs(qkv[..., :rotated].unflatten(2, (-1, width))).flatten(2), qkv[..., rotated:]], 2)
    got = rope_write(qkv, Rotation(cos, sin, kernel.layer(1)), norms)
    nearly_all_equal(got, q)
    nearly_all_equal(kernel.keys, eager.keys)
    assert torch.equal(kernel.values, eager.values)
    one_row = rope_write(qkv, Rotation(cos[:1], sin[:1], kernel.layer(0)), norms)  # angles of one row serve all
    assert torch.equal(one_row[0], got[0]) and not torch.equal(one_row[1], got[1])


@pytest.mark.parametrize("dtype", list(EXACTLY))
@pytest.mark.parametrize("width", [72, 576])
def test_add_rms_norm(width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, delta = (random(5, width, seed=s).to(device, dtype) for s in (1, 2))
    gain = random(width, seed=3).to(device, dtype)
    total, normed = add_rms_norm(x, delta, gain, 1e-5)
    assert torch.equal(total, x + delta)
    nearly_all_equal(normed, rms(x + delta, gain))
    same, alone = add_rms_norm(x, None, gain, 1e-5)
    assert same is x
    nearly_all_equal(alone, rms(x, gain))


@pytest.mark.parametrize("dtype", list(EXACTLY))
def test_silu_mul(dtype: torch.dtype, device: torch.device) -> None:
    both = random(3, 2 * 1500, seed=1, scale=3).to(device, dtype)
    gate, up = both.chunk(2, -1)
    nearly_all_equal(silu_mul(in_pairs(both)), F.silu(gate) * up)
