"""A kernel that reads and does next to nothing else: the bandwidth that others are measured against."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK, BLOCKS = 8192, 16


@triton.jit
def _read(x, sums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(BLOCKS):
        total += tl.load(x + (program * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sums + program, tl.sum(total))


def read_all(x: Tensor, sums: Tensor) -> None:
    """Every element of a dense ``x``, whose size is a multiple of 131,072, once; partial sums go to ``sums``."""
    programs = x.numel() // (BLOCK * BLOCKS)
    assert programs * BLOCK * BLOCKS == x.numel() and sums.numel() >= programs
    _read[(programs,)](x, sums, BLOCK, BLOCKS, num_warps=8)
