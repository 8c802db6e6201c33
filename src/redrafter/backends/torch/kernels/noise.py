"""The counter RNG's Gumbel noise in one kernel: the bits of ``algorithm/noise.py`` exactly, logs to rounding."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# The constants of algorithm/noise.py as int32: the same 32 bits, and products wrap.
_M1 = tl.constexpr(0x7FEB352D)
_M2 = tl.constexpr(0x846CA68B - (1 << 32))
_GOLDEN = tl.constexpr(0x9E3779B9 - (1 << 32))
_LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mix(x):
    """lowbias32; ``>>`` is arithmetic on int32, so the sign is masked off."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _M1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _M2
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def gumbel_of_bits(bits):
    """-log(-log1p(-u)) for the uniform u of 32 random bits.

    log1p(-u) = log(y) u / (1 - y) with y = 1 - u rounded: the rounding of y cancels, so small u keep their precision.
    """
    high = ((bits >> 16) & 0xFFFF).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.float32)
    u = high * 0.0000152587890625 + (low + 0.5) * 2.3283064365386963e-10  # 2**-16, 2**-32
    u = tl.where(u < _LARGEST_UNIFORM, u, _LARGEST_UNIFORM)
    y = 1.0 - u
    lost = 1.0 - y
    exponential = tl.where(lost == 0.0, u, -tl.log(y) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(exponential)


@triton.jit
def _noise(key, lengths, out, vocabulary, depths, BLOCK: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # over B x D
    batch_row = row // depths
    low = tl.load(key + 2 * batch_row).to(tl.int32)
    high = tl.load(key + 2 * batch_row + 1).to(tl.int32)
    place = (tl.load(lengths + batch_row) + 1 + row % depths).to(tl.int32)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # 1-element blocks, so that products wrap everywhere.
    a = _mix(_mix(tl.full([1], 0, tl.int32) + place + low) ^ high)
    b = _mix(_mix((tl.full([1], 0, tl.int32) + place) ^ high) + low)
    bits = _mix(_mix((token * _GOLDEN) ^ a) + b)
    value = bits if BITS else gumbel_of_bits(bits)
    tl.store(out + row * vocabulary + token, value, mask=token < vocabulary)


def _launch(key_B2: Tensor, lengths_B: Tensor, depths: int, out_BDV: Tensor) -> Tensor:
    rows, vocabulary = len(lengths_B), out_BDV.shape[-1]
    assert key_B2.is_contiguous() and lengths_B.is_contiguous()
    _noise[(rows * depths, triton.cdiv(vocabulary, _BLOCK))](
        key_B2,
        lengths_B,
        out_BDV,
        vocabulary,
        depths,
        BLOCK=_BLOCK,
        BITS=out_BDV.dtype == torch.int32,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out_BDV


def random_bits(key_B2: Tensor, lengths_B: Tensor, depths: int, vocabulary: int) -> Tensor:
    """int32 [B, D, V]: ``algorithm.noise.random_bits`` of the positions that ``gumbel`` looks at."""
    out = torch.empty(len(lengths_B), depths, vocabulary, dtype=torch.int32, device=lengths_B.device)
    return _launch(key_B2, lengths_B, depths, out)


def gumbel(key_B2: Tensor, lengths_B: Tensor, depths: int, vocabulary: int) -> Tensor:
    """float32 [B, D, V]: ``algorithm.noise.gumbel`` of the positions that a step behind ``lengths_B`` tokens chooses,
    lengths + 1 to lengths + D, and of tokens 0 to V - 1."""
    out = torch.empty(len(lengths_B), depths, vocabulary, dtype=torch.float32, device=lengths_B.device)
    return _launch(key_B2, lengths_B, depths, out)
