"""The drafter's trunk: a few new pairs write their keys and values and attend to the last ``window`` ones, one launch.

The eager twin is ``TorchDrafter._attention``. Letters: B rows, H heads, G heads per KV head, T pairs, S slots, d width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, float32

MAX_PAIRS = 64


@triton.jit
def _window_attention(
    query, new_keys, new_values, keys, values, first, out, scale,
    q_row, q_head, q_pair, k_row, k_head, k_pair, v_row, v_head, v_pair, kv_row, kv_head, kv_slot,
    PAIRS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    PAIRS_P: tl.constexpr, D_P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns one KV head of one row."""
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    start = tl.load(first + row)
    column = tl.arange(0, D_P)[None, :]
    base = row * kv_row + kv.to(tl.int64) * kv_head
    pair = tl.arange(0, PAIRS_P)[:, None]
    real = (pair < PAIRS) & (column < D)
    to = base + (start + pair) * kv_slot + column
    k_new = tl.load(new_keys + row * k_row + kv * k_head + pair * k_pair + column, mask=real, other=0.0)
    v_new = tl.load(new_values + row * v_row + kv * v_head + pair * v_pair + column, mask=real, other=0.0)
    tl.store(keys + to, k_new, mask=real)
    tl.store(values + to, v_new, mask=real)
    tl.debug_barrier()  # what other threads wrote is read below

    r = tl.arange(0, BM)
    mine = r // GROUP
    head = kv * GROUP + r % GROUP
    alive = mine < PAIRS
    inside = alive[:, None] & (column < D)
    place = row * q_row + head[:, None].to(tl.int64) * q_head + mine[:, None].to(tl.int64) * q_pair + column
    q = tl.load(query + place, mask=inside, other=0.0)
    position = start + mine
    end = start + PAIRS
    lowest = tl.maximum(start - (WINDOW - 1), 0)
    acc = tl.zeros((BM, D_P), tl.float32)
    maximum = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for block in range(BLOCKS):
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
    to_out = ((row * (KV_HEADS * GROUP) + head[:, None]) * PAIRS + mine[:, None]) * D + column
    tl.store(out + to_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def window_attention(
    query: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, first_B: Tensor, window: int
) -> Tensor:
    """[B, H, T, d], T <= MAX_PAIRS: pair t of row b goes to slot ``first_B[b]`` + t of ``keys`` and ``values``
    [B or more, Hkv, S, d] and sees the ``window`` slots up to its own. The last axes are dense."""
    rows, heads, pairs, width = query.shape
    kv_heads = new_keys.shape[1]
    assert pairs <= MAX_PAIRS and keys.stride() == values.stride() and first_B.is_contiguous()
    assert query.stride(3) == new_keys.stride(3) == new_values.stride(3) == keys.stride(3) == 1
    out = empty(rows, heads, pairs, width, dtype=query.dtype, device=query.device)
    group, block = heads // kv_heads, 64
    _window_attention[(rows, kv_heads)](
        query, new_keys, new_values, keys, values, first_B, out, width**-0.5,
        *query.stride()[:3], *new_keys.stride()[:3], *new_values.stride()[:3], *keys.stride()[:3],
        PAIRS=pairs, KV_HEADS=kv_heads, GROUP=group, D=width, WINDOW=window,
        PAIRS_P=triton.next_power_of_2(pairs), D_P=max(16, triton.next_power_of_2(width)),
        BM=max(16, triton.next_power_of_2(pairs * group)), BN=block, BLOCKS=triton.cdiv(window + pairs, block),
        PRECISION="ieee" if query.dtype == float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
