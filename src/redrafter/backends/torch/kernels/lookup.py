"""Prompt lookup in one launch: write down what was read last, find where the text was like this before, say what
followed. The eager twin is ``algorithm/lookup.find_chain`` of a text that ``TorchDrafter.read`` has written.

Letters: B rows, S positions, T pairs, L draft length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.algorithm.lookup import DOUBT, LEAST, MOST, Chain
from redrafter.backends.torch.graph import IDLE
from redrafter.backends.torch.kernels.early import early, start_early

BLOCK = 1024
"""Positions at a time."""


@triton.jit(do_not_specialize=["slots"])
def _find_chain(
    tokens, first, count, text, chain, weight, slots, idle, doubt, tokens_row, tokens_pair,
    PAIRS: tl.constexpr, PAIRS_P: tl.constexpr, LENGTH: tl.constexpr, LENGTH_P: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # Nothing here is newer than the launch before the last one, and the text is no other kernel's.
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(first + row)
    start = tl.where(start <= idle, slots - 1 - PAIRS, tl.maximum(start, 0))
    mine = text + row * slots
    pair = tl.arange(0, PAIRS_P)
    new = tl.load(tokens + row * tokens_row + pair * tokens_pair, mask=pair < PAIRS, other=0)
    tl.store(mine + start + 1 + pair, new, mask=pair < PAIRS)
    tl.debug_barrier()  # what other threads wrote is read below
    end = (start + tl.load(count + row)).to(tl.int32)

    best = tl.full([BLOCK], -1, tl.int64)
    for block in range(0, end, BLOCK):
        position = block + tl.arange(0, BLOCK)
        same = (position < end).to(tl.int32)
        equal = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(MOST):
            there = (position < end) & (position >= back)
            other = tl.load(mine + position - back, mask=there, other=-2)
            own = tl.load(mine + tl.maximum(end - back, 0))
            same = same & (other == own).to(tl.int32) & there.to(tl.int32)
            equal += same
        best = tl.maximum(best, tl.where(equal >= LEAST, (equal.to(tl.int64) << 32) | position.to(tl.int64), -1))
    found = tl.max(best, axis=0)
    equal = tl.maximum(found, 0) >> 32
    position = tl.where(found < 0, 0, found & 0xFFFFFFFF)
    ahead = tl.arange(0, LENGTH_P)
    period = tl.where(equal > 0, end - position, 1)
    token = tl.load(mine + position + 1 + ahead % period, mask=ahead < LENGTH, other=0)
    unknown = tl.cumsum((token < 0).to(tl.int32), axis=0)
    start_early(EARLY)
    sure = tl.where((equal > 0) & (unknown == 0), equal + ahead, 0).to(tl.float32)
    tl.store(chain + row * LENGTH + ahead, tl.maximum(token, 0), mask=ahead < LENGTH)
    tl.store(weight + row * LENGTH + ahead, sure / (sure + doubt), mask=ahead < LENGTH)


def find_chain(reading: Reading, text_BS: Tensor, length: int) -> Chain:
    """The reading's tokens written into ``text`` (contiguous; at least as many rows), then its chain. A row that begins
    before 0 begins at 0; an idle one (``graph.IDLE``) writes behind all texts. The reading must have been written
    before the launch before this one."""
    rows, pairs = reading.tokens.shape
    assert text_BS.is_contiguous() and rows <= len(text_BS) and pairs < text_BS.shape[1]
    assert reading.first.is_contiguous() and reading.count.is_contiguous()
    chain = torch.empty(rows, length, dtype=torch.int64, device=text_BS.device)
    weight = torch.empty(rows, length, dtype=torch.float32, device=text_BS.device)
    _find_chain[(rows,)](
        reading.tokens, reading.first, reading.count, text_BS, chain, weight, text_BS.shape[1], IDLE, DOUBT,
        *reading.tokens.stride(), PAIRS=pairs, PAIRS_P=triton.next_power_of_2(pairs),
        LENGTH=length, LENGTH_P=triton.next_power_of_2(length), LEAST=LEAST, MOST=MOST, BLOCK=BLOCK,
        num_warps=8, **early(chain),
    )  # fmt: skip
    return Chain(chain, weight)
