"""Matrices whose memory goes on behind their last row.

The tensor memory accelerator fetches blocks of 16 to 128 rows (``stream.py``), and is slow at the rows of a block
that a matrix does not have, which it fills with zeros. Layer of the 7B shape on one H200: 40 rows 134.7 us without
memory behind them, 133.0 with it. So what a product reads gets memory for a whole block. What lies there is never
looked at: a product's rows do not depend on one another.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

MOST = 128


def block_rows(rows: int) -> int:
    """Rows of the block that fetches a matrix of so many."""
    return max(16, 1 << (rows - 1).bit_length())


def tall(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor of this shape; its last axis is a matrix' columns, the others together are its rows."""
    rows = prod(shape[:-1])
    held = block_rows(rows) if rows <= MOST else rows
    return torch.empty(held, shape[-1], dtype=like.dtype, device=like.device)[:rows].view(shape)


def fetched(x_MK: Tensor) -> int:
    """Rows that may be fetched of a contiguous matrix: a whole block, if its memory holds that many."""
    (rows, columns), wanted = x_MK.shape, block_rows(len(x_MK))
    held = x_MK.untyped_storage().nbytes() // x_MK.element_size() - x_MK.storage_offset()
    return wanted if held >= wanted * columns else rows
