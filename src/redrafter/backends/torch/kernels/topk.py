"""The best children of every beam straight from the drafter's logits: log-softmax is never written out.

One pass over tiles of the vocabulary leaves each tile's CHILDREN largest scores and its log-sum-exp; the beam kernel
(``beam.py``) merges tiles. Exact because each of a row's CHILDREN largest scores is among its own tile's.

R = B x W rows, T tiles, V draft vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early

NO_KEY = tl.constexpr(-(2**63))
"""Below every key: marks lanes that hold nothing."""


class Coupling(NamedTuple):
    """Seed-coupled beams at one depth: rows that sample rank children by log q / T + G (``algorithm/beam.py``)."""

    noise: Tensor  # [B, V_target] float32
    inverse_temperature: Tensor  # [B] float32, 0 for greedy rows, which ignore the noise


class TileTops(NamedTuple):
    keys: Tensor  # [R, T, CHILDREN] int64, see ``order_key``; NO_KEY where a tile has fewer columns
    log_sum_exp: Tensor  # [R, T] float32


@triton.jit
def order_key(x, index):
    """int64 keys that sort as (x, then the lower index). NaN is above every number, as in torch; -0 equals 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    # Negative floats grow with their magnitude bits: turn those around, then integers sort as the floats do.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_value(key):
    """The float32 of a key; bit for bit, but for -0 and the payload of NaN."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    """The int64 index of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def safe_maximum(maximum):
    """What log-sum-exp may subtract: inf - inf would be NaN where torch says inf."""
    return tl.where((maximum == float("inf")) | (maximum == float("-inf")), 0.0, maximum)


@triton.jit
def _tile_tops(
    logits,
    noise,
    inverse_temperature,
    token_ids,
    keys,
    log_sum_exp,
    vocabulary,
    row_stride,
    noise_stride,
    beams,
    CHILDREN: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    COUPLED: tl.constexpr,
    REDUCED: tl.constexpr,
    EARLY: tl.constexpr,
):
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    x = tl.load(logits + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if COUPLED:
        batch_row = row // beams
        # Splat before comparing: the interpreter cannot splat a bool.
        inverse = tl.load(inverse_temperature + batch_row) + tl.zeros([BLOCK], tl.float32)
        token = column.to(tl.int64)
        if REDUCED:
            token = tl.load(token_ids + column, mask=inside, other=0)
        gumbel = tl.load(noise + batch_row * noise_stride + token, mask=inside & (inverse > 0), other=0.0)
        x = tl.where(inverse > 0, x * inverse + gumbel, x)

    maximum = safe_maximum(tl.max(tl.where(inside, x, float("-inf")), axis=0))
    total = tl.sum(tl.where(inside, tl.exp(x - maximum), 0.0), axis=0)
    place = row * tl.num_programs(1) + tile
    tl.store(log_sum_exp + place, tl.log(total) + maximum)

    key = tl.where(inside, order_key(x, column), NO_KEY)
    child = tl.arange(0, PADDED)
    best = tl.full([PADDED], NO_KEY, tl.int64)
    for i in range(CHILDREN):
        top = tl.max(key, axis=0)
        best = tl.where(child == i, top, best)
        key = tl.where(key == top, NO_KEY, key)
    tl.store(keys + place * CHILDREN + child, best, mask=child < CHILDREN)


def tile_size(vocabulary: int) -> int:
    """Columns per tile: about 32 tiles per row, so that one program can merge a row's tiles."""
    return min(max(triton.next_power_of_2(triton.cdiv(vocabulary, 32)), 1024), 4096)


def tile_tops(
    logits_BWV: Tensor, children: int, token_ids: Tensor | None = None, coupling: Coupling | None = None
) -> TileTops:
    """Each tile's ``children`` best of float32, bfloat16 or float16 logits whose last axis is dense."""
    rows, beams, vocabulary = logits_BWV.shape
    logits_RV = logits_BWV.reshape(rows * beams, vocabulary)
    assert logits_RV.stride(1) == 1 and children <= vocabulary
    # Many children of many tiles would take longer to merge than larger tiles take to scan.
    block = max(tile_size(vocabulary), 2048 if children > 4 else 0)
    tiles = triton.cdiv(vocabulary, block)
    keys = torch.empty(rows * beams, tiles, children, dtype=torch.int64, device=logits_BWV.device)
    log_sum_exp = torch.empty(rows * beams, tiles, dtype=torch.float32, device=logits_BWV.device)
    noise, inverse = (log_sum_exp, log_sum_exp) if coupling is None else coupling
    assert noise.stride(-1) == 1
    _tile_tops[(rows * beams, tiles)](
        logits_RV,
        noise,
        inverse,
        keys if token_ids is None else token_ids,
        keys,
        log_sum_exp,
        vocabulary,
        logits_RV.stride(0),
        noise.stride(0),
        beams,
        CHILDREN=children,
        PADDED=triton.next_power_of_2(children),
        BLOCK=block,
        COUPLED=coupling is not None,
        REDUCED=token_ids is not None,
        num_warps=block // 512,
        **early(keys),
        enable_fp_fusion=False,  # x * inverse + gumbel rounds twice, as in the algorithm
    )
    return TileTops(keys, log_sum_exp)
