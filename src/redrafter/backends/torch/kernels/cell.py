"""What every drafted token costs beside the head: the recurrent cell, and the residual block of the exit.

Both read the same state, so one launch makes both products; once the search has picked tokens and beams, the cell is
elementwise. Measured on one H200, 7B instrument, a draft of 8 beams and 8 depths: 269 us when the cell's product waited
for the search, 241 so; of four requests 356 and 294.

Letters: B rows of W beams, P beams before, S state, V tokens; M rows, N outputs, K inputs, U outputs of the cell's
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.matmul import MAX_ROWS

ROWS = 64
"""Of the weight, of a program that makes the block's and the cell's product."""


@triton.jit
def _gates(
    gates, index, index_row, state, parent, ahead, y, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    PARENT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK numbers of one beam."""
    start_early(EARLY)
    r = tl.program_id(0)
    row = r // W
    source = row * P + tl.load(parent + r) if PARENT else r
    token = tl.load(index + row * index_row + r % W)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < S
    table, known = gates + token * (3 * S) + n, ahead + source * (3 * S) + n
    r_gate = tl.load(table, mask=live, other=0.0).to(tl.float32) + tl.load(known, mask=live, other=0.0).to(tl.float32)
    z_gate = tl.load(table + S, mask=live, other=0.0).to(tl.float32)
    z_gate = tl.sigmoid(z_gate + tl.load(known + S, mask=live, other=0.0).to(tl.float32))
    z = tl.load(table + 2 * S, mask=live, other=0.0).to(tl.float32)
    z += tl.sigmoid(r_gate) * tl.load(known + 2 * S, mask=live, other=0.0).to(tl.float32)
    candidate = 2.0 * tl.sigmoid(2.0 * z) - 1.0  # tanh
    old = tl.load(state + source * S + n, mask=live, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    tl.store(y + r.to(tl.int64) * S + n, ((1.0 - z_gate) * candidate + z_gate * old).to(dtype), mask=live)


def gated(
    gates_V3S: Tensor, index_BW: Tensor, state_BPS: Tensor, parent_BW: Tensor | None, ahead_BP3S: Tensor
) -> Tensor:
    """[B, W, S]: the next state of every beam: ``gates[index]`` is W e of its token, ``state[b, parent]`` the old one,
    and ``ahead`` U s + bias of it. Without ``parent`` beam w continues beam w. Rows of ``index`` may lie any distance
    apart."""
    (rows, width), (_, before, S) = index_BW.shape, state_BPS.shape
    assert all(x.is_contiguous() for x in (gates_V3S, state_BPS, ahead_BP3S))
    assert width == before if parent_BW is None else parent_BW.is_contiguous()
    assert index_BW.stride(1) == 1 or width == 1
    y = torch.empty(rows, width, S, dtype=state_BPS.dtype, device=state_BPS.device)
    block = min(128, triton.next_power_of_2(S))
    _gates[(rows * width, triton.cdiv(S, block))](
        gates_V3S, index_BW, index_BW.stride(0), state_BPS, index_BW if parent_BW is None else parent_BW, ahead_BP3S,
        y, width, before, S, parent_BW is not None, block, num_warps=4, **early(y),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["M"])
def _block_and_cell(
    x, w, added, added_row, bias, y, ahead, M, N: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program multiplies ROWS weight rows with all of x: of the block's 2 N, or of the cell's U behind them."""
    start_early(EARLY)
    TILES: tl.constexpr = (2 * N + ROWS - 1) // ROWS
    tile = tl.program_id(0)
    of_block = tile < TILES
    line = tl.where(of_block, tile, tile - TILES) * ROWS + tl.arange(0, ROWS)
    exists = line < tl.where(of_block, 2 * N, U)
    row = w + (tl.where(of_block, 0, 2 * N) + line)[:, None] * K
    m = tl.arange(0, BM)
    acc = tl.zeros((ROWS, BM), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        v = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        w_k = tl.load(row + k[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(w_k, v, acc, input_precision=PRECISION)
    dtype = y.dtype.element_ty
    live = exists[:, None] & (m < M)[None, :]
    if of_block:
        acc += tl.load(added + m[None, :] * added_row + line[:, None], mask=live, other=0.0).to(tl.float32)
        outer, inner = tl.split(tl.reshape(tl.trans(acc), (BM, ROWS // 2, 2)))
        inner = inner.to(dtype).to(tl.float32)
        inner = (inner / (1.0 + tl.exp(-inner))).to(dtype).to(tl.float32)
        n = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        place = y + m[:, None] * N + n[None, :]
        tl.store(place, (outer.to(dtype).to(tl.float32) + inner).to(dtype), mask=(m < M)[:, None] & (n < N)[None, :])
    elif U > 0:
        acc += tl.load(bias + line, mask=exists, other=0.0).to(tl.float32)[:, None]
        tl.store(ahead + m[None, :] * U + line[:, None], acc.to(dtype), mask=live)


def block_and_cell(
    x_MK: Tensor, weight: Tensor, added_MN: Tensor, bias_U: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[M, N]: a + silu(b), where a and b in turn are x W^T + ``added``, of the weight's first 2 N rows; and, with
    ``bias_U``, what the cell will add of the same states, x U^T + bias [M, U], of the rows behind: that does not depend
    on the tokens the search is about to pick. M <= MAX_ROWS; rows of ``added`` may lie any distance apart, 0 included.
    """
    (M, K), width = x_MK.shape, added_MN.shape[1]
    U = 0 if bias_U is None else len(bias_U)
    assert x_MK.is_contiguous() and weight.is_contiguous() and M <= MAX_ROWS
    assert weight.shape == (width + U, K) and added_MN.shape == (M, width) and added_MN.stride(1) == 1
    y, ahead = x_MK.new_empty(M, width // 2), x_MK.new_empty(M, U)
    # Fastest of 9 to 20 cuts, of 8 to 64 rows with 576 and 1,152 inputs: as many bytes on their way as there is room.
    BK = (256 if K >= 1024 else 128) // x_MK.element_size()
    stages = 9 if M <= 16 else 5 if M <= 64 else 4
    _block_and_cell[(triton.cdiv(width, ROWS) + triton.cdiv(U, ROWS),)](
        x_MK, weight, added_MN, added_MN.stride(0), y if bias_U is None else bias_U, y, ahead, M, width // 2, K, U,
        max(16, triton.next_power_of_2(M)), ROWS, BK, "tf32" if y.element_size() == 2 else "ieee",
        num_warps=4, num_stages=stages, **early(y),
    )  # fmt: skip
    return y, None if bias_U is None else ahead
