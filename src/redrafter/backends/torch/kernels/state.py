"""What surrounds a step's forward, one launch each: where its nodes go, and the state that it leaves.

The eager twins are ``TorchTarget.verify``'s own lines and ``algorithm.step.advance``. A row of length ``IDLE`` has no
request: its nodes go behind all texts and its state stays idle.

Letters: B rows, N nodes, T depths, F feature width, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.backends.torch.graph import IDLE, STOPS, Ends
from redrafter.backends.torch.kernels.early import early, start_early


class Places(NamedTuple):
    slots: Tensor  # [B, N] int64 of the cache
    positions: Tensor  # [B, N] int64
    mask: Tensor
    """[B, 1, N, 3] int64, a mask for ``attention.kernel_attention``: ancestor words, and the tokens before the tree"""


@triton.jit
def _place(
    depth, words, lengths, slots, positions, mask, capacity, depth_row, word_row, word_node, length_row,
    NODES: tl.constexpr, NODES_P: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES_P).to(tl.int64)
    real = node < NODES
    length = tl.load(lengths + row * length_row)
    first = tl.where(length < 0, capacity - NODES, length)
    length = tl.maximum(length, 0)
    to = row * NODES + node
    tl.store(slots + to, first + node, mask=real)
    tl.store(positions + to, length + tl.load(depth + row * depth_row + node, mask=real, other=0), mask=real)
    source = words + row * word_row + node * word_node
    tl.store(mask + to * 3, tl.load(source, mask=real, other=0), mask=real)
    tl.store(mask + to * 3 + 1, tl.load(source + 1, mask=real, other=0), mask=real)
    tl.store(mask + to * 3 + 2, length + 0 * node, mask=real)


def place_nodes(depth_BN: Tensor, words_BN2: Tensor, lengths_B: Tensor, capacity: int) -> Places:
    """Nodes lie behind each row's ``lengths_B`` tokens and stand at their depth behind them. ``words_BN2``: ancestors
    as bits (``pack``); ``capacity``: slots of a row."""
    rows, nodes = depth_BN.shape
    slots, positions = (torch.empty(rows, nodes, dtype=torch.int64, device=depth_BN.device) for _ in range(2))
    mask = torch.empty(rows, 1, nodes, 3, dtype=torch.int64, device=depth_BN.device)
    assert depth_BN.stride(1) == 1 and words_BN2.stride(2) == 1
    _place[(rows,)](
        depth_BN, words_BN2, lengths_B, slots, positions, mask, capacity,
        depth_BN.stride(0), words_BN2.stride(0), words_BN2.stride(1), lengths_B.stride(0),
        NODES=nodes, NODES_P=triton.next_power_of_2(nodes), num_warps=4, **early(slots),
    )  # fmt: skip
    return Places(slots, positions, mask)


class Advanced(NamedTuple):
    features: Tensor  # [B, T, F] of the accepted path
    first: Tensor  # [B] int64
    pairs: Tensor  # [B] int64 how many of the depths count
    lengths: Tensor  # [B] int64


@triton.jit
def _advance(
    features, path, accepted, tokens, lengths, stops, full, out, first, count, after, idle, f_row, f_node,
    DEPTHS: tl.constexpr, DEPTHS_P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STOPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program copies BLOCK features of one depth; the first of a row writes its numbers."""
    start_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    depth = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    node = tl.load(path + row * DEPTHS + depth)
    x = tl.load(features + row * f_row + node * f_node + column, mask=inside, other=0.0)
    tl.store(out + (row * DEPTHS + depth) * WIDTH + column, x, mask=inside)
    if (depth == 0) & (tl.program_id(2) == 0):
        length = tl.load(lengths + row)
        kept = tl.load(accepted + row) + 1
        tl.store(first + row, length)
        tl.store(count + row, kept)
        known = length + kept
        if STOPS > 0:
            step = tl.arange(0, DEPTHS_P)
            emitted = tl.load(tokens + row * DEPTHS + step, mask=step < DEPTHS, other=-2)
            stop = tl.load(stops + row * STOPS + tl.arange(0, STOPS))
            last = tl.sum((emitted[:, None] == stop[None, :]).to(tl.int32)) > 0
            known = tl.where(last | (known >= tl.load(full + row)), idle, known)
        tl.store(after + row, tl.where(length <= idle, length, known))


def advance(features_BNF: Tensor, accepted: Accepted, lengths_B: Tensor, ends: Ends | None = None) -> Advanced:
    """``algorithm.step.advance``: what is read next, from where, how much of it counts, and the lengths. Rows whose
    answer ended (``graph.Ends``) are idle."""
    rows, depths = accepted.path.shape
    width = features_BNF.shape[2]
    assert features_BNF.stride(2) == 1
    numbers = (accepted.path, accepted.length, accepted.tokens, lengths_B)
    stops, full = (lengths_B, lengths_B) if ends is None else ends
    assert all(x.is_contiguous() for x in (*numbers, stops, full))
    out = torch.empty(rows, depths, width, dtype=features_BNF.dtype, device=features_BNF.device)
    first, count, after = (torch.empty_like(lengths_B) for _ in range(3))
    block = min(2048, triton.next_power_of_2(width))
    _advance[(rows, depths, triton.cdiv(width, block))](
        features_BNF, *numbers, stops, full, out, first, count, after, IDLE, *features_BNF.stride()[:2],
        DEPTHS=depths, DEPTHS_P=triton.next_power_of_2(depths), WIDTH=width, BLOCK=block,
        STOPS=0 if ends is None else STOPS, num_warps=4, **early(out),
    )  # fmt: skip
    return Advanced(out, first, count, after)
