"""The counter RNG and the Gumbel noise made from it.

One number per (seed, choice index, absolute position, token id), the same 32 bits on every backend. Plain and
speculative decoding look the noise up instead of drawing it, so they add the same numbers to the same logits: that
is what makes seeded sampling exact (docs/algorithm.md). Only low 32-bit products, shifts and xors are used, because
every backend has them natively; the mixer is the 'lowbias32' integer hash (C. Wellons, 2018), two rounds per word.
"""

from __future__ import annotations

from redrafter.algorithm.ops import Array, Ops

_M1, _M2, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
_MASK = 0xFFFFFFFF


def _signed(x: int) -> int:
    """The int32 that has the same 32 bits."""
    x &= _MASK
    return x - (1 << 32) if x >> 31 else x


def mix_int(x: int) -> int:
    """lowbias32 on a Python int: 32 bits in, 32 bits out. A bijection."""
    x ^= x >> 16
    x = (x * _M1) & _MASK
    x ^= x >> 15
    x = (x * _M2) & _MASK
    return x ^ (x >> 16)


def key_of(seed: int, index: int = 0) -> tuple[int, int]:
    """Two int32 noise keys for a 64-bit seed and the index of the answer among those asked for with that seed."""
    low = mix_int((seed & _MASK) ^ mix_int(index & _MASK))
    high = mix_int(((seed >> 32) & _MASK) ^ mix_int((low + _GOLDEN) & _MASK))
    return _signed(low), _signed(high)


def _mix(x: Array) -> Array:
    """lowbias32 on int32 arrays; ``>>`` is arithmetic there, so the sign is masked off."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(_M1)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(_M2)
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(ops: Ops, key_B2: Array, position_BP: Array, token_V: Array) -> Array:
    """int32 [B, P, V]: the random word of every (row, position, token)."""
    position = ops.int32(position_BP)
    low, high = ops.int32(key_B2[:, :1]), ops.int32(key_B2[:, 1:])
    # Two words of state per position (64 bits), so that two positions share a noise row with probability 2**-64.
    a_BP1 = _mix(_mix(position + low) ^ high)[:, :, None]
    b_BP1 = _mix(_mix(position ^ high) + low)[:, :, None]
    token = ops.int32(token_V)[None, None, :] * _signed(_GOLDEN)
    return _mix(_mix(token ^ a_BP1) + b_BP1)


def gumbel(ops: Ops, key_B2: Array, position_BP: Array, token_V: Array) -> Array:
    """float32 [B, P, V]: standard Gumbel noise, from -2.82 to 22.9.

    argmax(logits/T + noise) is a draw from softmax(logits/T). The uniform number keeps 32 bits where it is small, and
    small uniform numbers make the large noise that decides the argmax: G = -log(-log1p(-u)).
    """
    bits = random_bits(ops, key_B2, position_BP, token_V)
    high, low = ops.float32((bits >> 16) & 0xFFFF), ops.float32(bits & 0xFFFF)
    u = high * 2.0**-16 + (low + 0.5) * 2.0**-32
    u = ops.where(u < 1.0 - 2.0**-24, u, 1.0 - 2.0**-24)  # rounding may reach 1, whose noise would be -inf
    return -ops.log(-ops.log1p(-u))
