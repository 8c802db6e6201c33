"""The best children of every beam straight from the drafter's logits: log-softmax is never written out.

One pass over tiles of the vocabulary leaves each tile's CHILDREN largest scores and its log-sum-exp; ``beam.py`` merges
tiles. Exact because each of a row's CHILDREN largest scores is among its own tile's.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NO_KEY = tl.constexpr(-(2**63))
"""Below every key: marks lanes that hold nothing."""
_NO_SHORT_KEY = tl.constexpr(-(2**31))


class Coupling(NamedTuple):
    """Seed-coupled beams at one depth: rows that sample rank children by log q / T + G (``algorithm/beam.py``)."""

    noise: Tensor  # [B, V_target] float32
    inverse_temperature: Tensor  # [B] float32, 0 for greedy rows, which ignore the noise


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
def _short_key(x, place):
    """int32 keys that sort as ``order_key`` does, of 16-bit numbers and places below 2^16."""
    value = x.to(tl.float32)
    bits = tl.where(value == 0.0, 0, x.to(tl.int16, bitcast=True).to(tl.int32))
    bits = tl.where(value != value, 0x7FFF, bits)
    return (tl.where(bits < 0, bits ^ 0x7FFF, bits) << 16) | (0xFFFF - place)


@triton.jit
def _long_key(short, start, dtype: tl.constexpr):
    """``order_key`` of what a short key holds, its place counted from ``start`` on."""
    bits = short >> 16
    x = tl.where(bits < 0, bits ^ 0x7FFF, bits).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return order_key(x, start + (0xFFFF - (short & 0xFFFF)))


@triton.jit
def safe_maximum(maximum):
    """What log-sum-exp may subtract: inf - inf would be NaN where torch says inf."""
    return tl.where((maximum == float("inf")) | (maximum == float("-inf")), 0.0, maximum)


@triton.jit
def scan(
    row, tile, logits, noise, inverse_temperature, token_ids, keys, log_sum_exp,
    vocabulary, row_stride, noise_stride, beams, tiles,
    CHILDREN: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, COUPLED: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """One tile of one beam's scores, float32, bfloat16 or float16: ``keys`` [rows, tiles, CHILDREN] of its best, NO_KEY
    where it has fewer columns, and ``log_sum_exp`` [rows, tiles]. A row is a beam of a request."""
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    logit = tl.load(logits + row * row_stride + column, mask=inside, other=float("-inf"))
    x = logit.to(tl.float32)
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
    place = row * tiles + tile
    tl.store(log_sum_exp + place, tl.log(total) + maximum)

    child = tl.arange(0, PADDED)
    if COUPLED or logits.dtype.element_ty == tl.float32:
        key = tl.where(inside, order_key(x, column), NO_KEY)
        best = tl.full([PADDED], NO_KEY, tl.int64)
        for i in range(CHILDREN):
            top = tl.max(key, axis=0)
            best = tl.where(child == i, top, best)
            key = tl.where(key == top, NO_KEY, key)
    else:  # keys of half the length, which a warp compares in one instruction
        short = tl.where(inside, _short_key(logit, tl.arange(0, BLOCK)), _NO_SHORT_KEY)
        shorts = tl.full([PADDED], _NO_SHORT_KEY, tl.int32)
        for i in range(CHILDREN):
            top = tl.max(short, axis=0)
            shorts = tl.where(child == i, top, shorts)
            short = tl.where(short == top, _NO_SHORT_KEY, short)
        best = tl.where(shorts == _NO_SHORT_KEY, NO_KEY, _long_key(shorts, tile * BLOCK, logits.dtype.element_ty))
    tl.store(keys + place * CHILDREN + child, best, mask=child < CHILDREN)


def tile_size(vocabulary: int) -> int:
    """Columns per tile: about 32 tiles per row, so that one program can merge a row's tiles."""
    return min(max(triton.next_power_of_2(triton.cdiv(vocabulary, 32)), 1024), 4096)


def block_for(vocabulary: int, children: int) -> int:
    """Many children of many tiles would take longer to merge than larger tiles take to scan."""
    return max(tile_size(vocabulary), 2048 if children > 4 else 0)
