"""Rotary embedding and the cache write at the end of the product that makes q, k and v: a launch less per layer.

The rotation mixes columns j and j + d / 2 of a head. A program of ``stream.py`` has a few columns of all rows, and
wants both: so the two lie beside each other in the weights of q and k, and stay there in queries and cached keys, whose
products do not change if both are reordered alike. Slow twin: ``norms.rope_write`` of the product's output, the same
bits.

Letters: B rows, N tokens, M = B x N, H heads, Hkv KV heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.commit import LayerSlots


class Rotation(NamedTuple):
    """Where q, k and v of M = B x N tokens go, and by which angles the first two are turned."""

    cos: Tensor  # [B or 1, N, d], both halves alike
    sin: Tensor
    stored: LayerSlots

    def heads(self, outputs: int) -> tuple[int, int, int]:
        """(H, Hkv, d) of a product with so many outputs."""
        _, kv_heads, _, width = self.stored.keys.shape
        return outputs // width - 2 * kv_heads, kv_heads, width

    def fits(self, outputs: int, tile: int) -> bool:
        """Whether tiles of so many outputs hold nothing but queries, keys or values."""
        heads, kv_heads, width = self.heads(outputs)
        return tile % 2 == 0 and heads * width % tile == 0 == kv_heads * width % tile

    def arguments(self, outputs: int) -> tuple[tuple[Tensor | int, ...], tuple[int, int, int]]:
        """What ``rotate_write`` takes, and its sizes."""
        keys, values, slots = self.stored
        assert keys.stride() == values.stride() and self.cos.stride() == self.sin.stride()
        assert self.cos.stride(2) == keys.stride(3) == slots.stride(1) == 1 and self.cos.shape[2] == keys.shape[3]
        cos_row = self.cos.stride(0) if len(self.cos) > 1 else 0
        strides = (slots.shape[1], cos_row, self.cos.stride(1), slots.stride(0), *keys.stride()[:3])
        return (self.cos, self.sin, slots, keys, values, *strides), self.heads(outputs)


def interleaved(rows: Tensor, width: int) -> Tensor:
    """Rows of whole heads (of a weight, or a bias), those of columns j and j + d / 2 beside each other."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


@triton.jit
def turned(x, c, s, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pairs of neighbours of ``x`` [ROWS, COLUMNS] turned by angles [.., COLUMNS / 2]. Products are rounded, as
    transformers rounds them; launches say ``enable_fp_fusion=False``, or a fused multiply-add would skip one."""
    low, high = tl.split(tl.reshape(x.to(tl.float32), (ROWS, COLUMNS // 2, 2)))
    c, s = c.to(tl.float32), s.to(tl.float32)
    low_c, high_s = (low * c).to(dtype).to(tl.float32), (high * s).to(dtype).to(tl.float32)
    high_c, low_s = (high * c).to(dtype).to(tl.float32), (low * s).to(dtype).to(tl.float32)
    return tl.reshape(tl.join(low_c - high_s, high_c + low_s), (ROWS, COLUMNS)).to(dtype)


@triton.jit
def rotate_write(
    acc, q, rotation, tile, M, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``acc`` [BN, BM] float32: outputs ``tile`` x BN onward of M tokens; ``rotation``: ``Rotation.arguments``."""
    cos, sin, slots, keys, values, tokens, cos_row, cos_token, slot_row, cache_row, cache_head, cache_slot = rotation
    dtype: tl.constexpr = q.dtype.element_ty
    m = tl.arange(0, BM)[:, None]
    row, token = m // tokens, m % tokens
    live = m < M
    slot = tl.load(slots + row * slot_row + token, mask=live, other=0)
    to = row.to(tl.int64) * cache_row + slot * cache_slot
    x = tl.trans(acc).to(dtype)
    first = tile * BN
    n = first + tl.arange(0, BN)[None, :]
    # A tile within one head says so, for its numbers to be read and written several at once.
    head, column = n // WIDTH, n % WIDTH
    if WIDTH % BN == 0:
        at = tl.multiple_of(first % WIDTH, BN)
        head, column = first // WIDTH, at + tl.arange(0, BN)[None, :]
    if first < (HEADS + KV_HEADS) * WIDTH:
        pair = ((first + 2 * tl.arange(0, BN // 2)) % WIDTH // 2)[None, :]
        if WIDTH % BN == 0:
            pair = tl.multiple_of(at // 2, BN // 2) + tl.arange(0, BN // 2)[None, :]
        angle = row * cos_row + token * cos_token + pair
        c = tl.load(cos + angle, mask=live, other=0.0)
        s = tl.load(sin + angle, mask=live, other=0.0)
        y = turned(x, c, s, dtype, BM, BN)
        if first < HEADS * WIDTH:
            tl.store(q + m * (HEADS * WIDTH) + n, y, mask=live)
        else:
            place = to + (head - HEADS) * cache_head + column
            tl.store(keys + place, y.to(keys.dtype.element_ty), mask=live)
    else:
        place = to + (head - HEADS - KV_HEADS) * cache_head + column
        tl.store(values + place, x.to(values.dtype.element_ty), mask=live)
