"""The drafter's trunk: a few new pairs write their keys and values and attend to the last ``window`` ones, one launch.

The eager twin is ``TorchDrafter._attention``, with ``trunk.rotate`` before it where the kernel rotates.

Letters: B rows, H heads, T pairs, S slots, d width.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from redrafter.backends.torch.graph import IDLE
from redrafter.backends.torch.kernels.early import early, start_early

MAX_PAIRS = 64


@triton.jit
def _turned(source, place, column, inside, cos, sin, angle, ROTATE: tl.constexpr, D: tl.constexpr):
    """Heads [.., D_P] as they lie at ``source + place``, or rotated by ``angle``, rounded where torch rounds."""
    x = tl.load(source + place + column, mask=inside, other=0.0)
    if ROTATE:
        dtype = x.dtype
        half: tl.constexpr = D // 2
        first = column < half
        partner = tl.load(source + place + tl.where(first, column + half, column - half), mask=inside, other=0.0)
        partner = tl.where(first, -partner.to(tl.float32), partner.to(tl.float32))
        c = tl.load(cos + angle * D + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angle * D + column, mask=inside, other=0.0).to(tl.float32)
        x = ((x.to(tl.float32) * c).to(dtype).to(tl.float32) + (partner * s).to(dtype).to(tl.float32)).to(dtype)
    return x


@triton.jit
def _window_attention(
    query, new_keys, new_values, keys, values, cos, sin, first, count, out, scale, slots, idle,
    q_row, q_head, q_pair, k_row, k_head, k_pair, v_row, v_head, v_pair, kv_row, kv_head, kv_slot,
    PAIRS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, ROTATE: tl.constexpr, LAST: tl.constexpr,
    PAIRS_P: tl.constexpr, D_P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns one KV head of one row."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    start = tl.load(first + row)
    start = tl.where(start <= idle, slots - PAIRS, tl.maximum(start, 0))
    column = tl.arange(0, D_P)[None, :]
    base = row * kv_row + kv.to(tl.int64) * kv_head
    pair = tl.arange(0, PAIRS_P)[:, None]
    new = pair < PAIRS
    real = new & (column < D)
    place = row * k_row + kv * k_head + pair * k_pair
    k_new = _turned(new_keys, place, column, real, cos, sin, start + pair, ROTATE, D)
    v_new = tl.load(new_values + row * v_row + kv * v_head + pair * v_pair + column, mask=real, other=0.0)
    to = base + (start + pair) * kv_slot + column
    tl.store(keys + to, k_new, mask=real)
    tl.store(values + to, v_new, mask=real)
    tl.debug_barrier()  # what other threads wrote is read below

    r = tl.arange(0, BM)
    mine = r // GROUP
    head = kv * GROUP + r % GROUP
    alive = mine < QUERIES
    inside = alive[:, None] & (column < D)
    position = start + mine
    asked = mine
    if LAST:
        position = start + tl.load(count + row) - 1 + 0 * mine
        asked = PAIRS - 1 + 0 * mine
    place = row * q_row + head[:, None].to(tl.int64) * q_head + asked[:, None].to(tl.int64) * q_pair
    q = _turned(query, place, column, inside, cos, sin, position[:, None], ROTATE, D)
    lowest = tl.maximum(start - (WINDOW - 1), 0)
    end = start + PAIRS
    if LAST:
        end = start + tl.load(count + row)
        lowest = tl.maximum(end - WINDOW, 0)
    blocks = ((end - lowest + BN - 1) // BN).to(tl.int32)
    acc = tl.zeros((BM, D_P), tl.float32)
    maximum = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for block in range(blocks):
        slot = lowest + block * BN + tl.arange(0, BN)
        stored = (slot < end)[:, None] & (column < D)
        source = base + slot[:, None] * kv_slot + column
        k = tl.load(keys + source, mask=stored, other=0.0)
        v = tl.load(values + source, mask=stored, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        distance = position[:, None] - slot[None, :]
        scores = tl.where((distance >= 0) & (distance < WINDOW), scores, float("-inf"))
        largest = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp(scores - largest[:, None])
        shrink = tl.exp(maximum - largest)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        maximum = largest
    to_out = ((row * (KV_HEADS * GROUP) + head[:, None]) * QUERIES + mine[:, None]) * D + column
    tl.store(out + to_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


class Rotation(NamedTuple):
    """Queries and keys are rotated on their way in, each by its own position."""

    cos: Tensor  # [S, d]
    sin: Tensor  # [S, d]


def window_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    first_B: Tensor,
    window: int,
    rotation: Rotation | None = None,
    count_B: Tensor | None = None,
) -> Tensor:
    """[B, H, T, d], T <= MAX_PAIRS: pair t of row b goes to slot ``first_B[b]`` + t of the cached keys and values
    [B or more, Hkv, S, d] and sees the ``window`` slots up to its own. A row that begins before 0 begins at 0, an idle
    one (``graph.IDLE``) ends at the last slot.

    ``qkv``: queries [B, H, T, d], new keys and values [B, Hkv, T, d]; the last axes are dense. With ``count_B``, of
    whose pairs those past the count repeat the last one, only that one asks: [B, H, 1, d].
    """
    (query, new_keys, new_values), (keys, values) = qkv, cached
    rows, heads, pairs, width = query.shape
    kv_heads, slots = new_keys.shape[1], keys.shape[2]
    assert pairs <= min(MAX_PAIRS, slots) and keys.stride() == values.stride() and first_B.is_contiguous()
    assert query.stride(3) == new_keys.stride(3) == new_values.stride(3) == keys.stride(3) == 1
    assert count_B is None or count_B.is_contiguous()
    cos, sin = rotation or (query, query)
    assert rotation is None or (
        cos.shape == sin.shape == (slots, width) and cos.is_contiguous() and sin.is_contiguous()
    )
    queries = pairs if count_B is None else 1
    out = empty(rows, heads, queries, width, dtype=query.dtype, device=query.device)
    group = heads // kv_heads
    # Few programs, each of which waits for its blocks one after the other: fewer, larger ones where they fit.
    large = query.element_size() == 2 and width <= 64
    _window_attention[(rows, kv_heads)](
        query, new_keys, new_values, keys, values, cos, sin, first_B, first_B if count_B is None else count_B, out,
        width**-0.5, slots, IDLE,
        *query.stride()[:3], *new_keys.stride()[:3], *new_values.stride()[:3], *keys.stride()[:3],
        PAIRS=pairs, KV_HEADS=kv_heads, GROUP=group, D=width, WINDOW=window,
        QUERIES=queries, ROTATE=rotation is not None, LAST=count_B is not None,
        PAIRS_P=triton.next_power_of_2(pairs), D_P=max(16, triton.next_power_of_2(width)),
        BM=max(16, triton.next_power_of_2(queries * group)), BN=256 if large else 64,
        PRECISION="ieee" if query.dtype == float32 else "tf32", num_warps=8 if large else 4,
        num_stages=1 if large else 2, **early(out),
    )  # fmt: skip
    return out
