"""What every drafted token costs beside the head: the recurrent cell, and the residual block of the exit.

With so few rows it is not the multiplications that take time but the order of the additions: one warp's chain of them.
So a program's warps each add a part of every sum (``tl.dot`` with a leading axis of parts), and the parts are added
last. Measured on one H200, 7B instrument, a draft of 8 beams and 8 depths: 341 us, 25 less with the cell's sums in
parts, 18 less with the block's. More warps, weights asked for before the launch may start, and what the gates add
loaded first gained nothing.

Letters: R = B x W beams, P beams before, S state, M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.matmul import MAX_ROWS

PARTS = 2
BLOCK_ROWS = 32
"""Rows of a program; more rows are further programs."""
SMALL_ROWS, SMALL_BYTES, SMALL_PARTS = 16, 4096, 4
"""Up to so many rows, and bytes of a row, a program's weights of the block fit into its registers: a draft of eight
depths takes 6 us less with 576 inputs and 9 with 1,152. The cell's, half as many again, gain nothing there."""


@triton.jit
def _in_parts(start, PARTS: tl.constexpr, BK: tl.constexpr):
    """[PARTS, BK / PARTS]: the columns of a block, one part of them per warp."""
    part = tl.arange(0, PARTS)[:, None] * (BK // PARTS)
    return start + part + tl.arange(0, BK // PARTS)[None, :]


@triton.jit(do_not_specialize=["R"])
def _gru(
    gates, index, index_row, state, parent, u, bias, y, R, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    PARENT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The input's part of the gates is row ``index`` of a table, the old state that of beam ``parent`` of the P that
    this one's row had, or of the same beam."""
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    alive = r < R
    row = r // W
    source = row * P + tl.load(parent + r, mask=alive, other=0) if PARENT else r
    dtype = state.dtype.element_ty
    reset = tl.zeros((PARTS, BN, BR), tl.float32)
    keep = tl.zeros((PARTS, BN, BR), tl.float32)
    new = tl.zeros((PARTS, BN, BR), tl.float32)
    for start in range(0, S, BK):
        k = _in_parts(start, PARTS, BK)
        mask = (n < S)[None, :, None] & (k < S)[:, None, :]
        place = u + n[None, :, None] * S + k[:, None, :]
        w_r = tl.load(place, mask=mask, other=0.0)
        w_k = tl.load(place + S * S, mask=mask, other=0.0)
        w_n = tl.load(place + 2 * S * S, mask=mask, other=0.0)
        inside = alive[None, None, :] & (k < S)[:, :, None]
        v = tl.load(state + source[None, None, :] * S + k[:, :, None], mask=inside, other=0.0)
        reset = tl.dot(w_r, v, reset, input_precision=PRECISION)
        keep = tl.dot(w_k, v, keep, input_precision=PRECISION)
        new = tl.dot(w_n, v, new, input_precision=PRECISION)
    live = (n < S)[:, None] & alive[None, :]
    column = n[:, None] + 0 * r[None, :]
    token = tl.load(index + row * index_row + r % W, mask=alive, other=0)
    table = gates + token[None, :] * (3 * S) + column
    of_reset = tl.sum(reset, 0) + tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    of_keep = tl.sum(keep, 0) + tl.load(bias + S + column, mask=live, other=0.0).to(tl.float32)
    of_new = tl.sum(new, 0) + tl.load(bias + 2 * S + column, mask=live, other=0.0).to(tl.float32)
    r_gate = tl.sigmoid(of_reset.to(dtype).to(tl.float32) + tl.load(table, mask=live, other=0.0).to(tl.float32))
    z_gate = tl.sigmoid(of_keep.to(dtype).to(tl.float32) + tl.load(table + S, mask=live, other=0.0).to(tl.float32))
    z = tl.load(table + 2 * S, mask=live, other=0.0).to(tl.float32) + r_gate * of_new.to(dtype).to(tl.float32)
    candidate = 2.0 * tl.sigmoid(2.0 * z) - 1.0  # tanh
    old = tl.load(state + source[None, :] * S + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + r[None, :] * S + column, ((1.0 - z_gate) * candidate + z_gate * old).to(dtype), mask=live)


def gru_step(
    gates_V3S: Tensor, index_BW: Tensor, state_BPS: Tensor, parent_BW: Tensor | None, u_3SS: Tensor, bias_3S: Tensor
) -> Tensor:
    """[B, W, S]: the next state of every beam: ``gates[index]`` is W e of its token, ``state[b, parent]`` the old one.
    Without ``parent`` beam w continues beam w. Rows of ``index`` may lie any distance apart."""
    rows, width = index_BW.shape
    R, (_, before, S) = rows * width, state_BPS.shape
    assert state_BPS.is_contiguous() and gates_V3S.is_contiguous() and R <= MAX_ROWS
    assert width == before if parent_BW is None else parent_BW.is_contiguous()
    assert index_BW.stride(1) == 1 or width == 1
    y = torch.empty(rows, width, S, dtype=state_BPS.dtype, device=state_BPS.device)
    BR = _block_rows(R)
    half = y.element_size() == 2  # deeper blocks would not fit
    BK = 64 if not half else 256 if S >= 1024 and BR == 16 else 128
    _gru[(triton.cdiv(S, 16), triton.cdiv(R, BR))](
        gates_V3S, index_BW, index_BW.stride(0), state_BPS, index_BW if parent_BW is None else parent_BW, u_3SS,
        bias_3S, y, R, width, before, S, parent_BW is not None, BR, 16, BK, PARTS, "tf32" if half else "ieee",
        num_warps=PARTS, num_stages=3 if not half else 5 if BK == 256 else 6, **early(y),
    )  # fmt: skip
    return y


@triton.jit
def _gates(
    gates, index, index_row, state, parent, ahead, y, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same where U s + bias is known of the P states: a program makes BLOCK numbers of one beam."""
    start_early(EARLY)
    r = tl.program_id(0)
    row = r // W
    source = row * P + tl.load(parent + r)
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


def gated(gates_V3S: Tensor, index_BW: Tensor, state_BPS: Tensor, parent_BW: Tensor, ahead_BP3S: Tensor) -> Tensor:
    """``gru_step`` of states whose part ``block_and_cell`` has computed."""
    (rows, width), (_, before, S) = index_BW.shape, state_BPS.shape
    assert all(x.is_contiguous() for x in (gates_V3S, state_BPS, parent_BW, ahead_BP3S))
    assert index_BW.stride(1) == 1 or width == 1
    y = torch.empty(rows, width, S, dtype=state_BPS.dtype, device=state_BPS.device)
    block = min(128, triton.next_power_of_2(S))
    _gates[(rows * width, triton.cdiv(S, block))](
        gates_V3S, index_BW, index_BW.stride(0), state_BPS, parent_BW, ahead_BP3S, y, width, before, S, block,
        num_warps=4, **early(y),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["M"])
def _block(
    x, w, added, added_row, y, M, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    dtype = y.dtype.element_ty
    a = tl.zeros((PARTS, BN, BM), tl.float32)
    b = tl.zeros((PARTS, BN, BM), tl.float32)
    for start in range(0, K, BK):
        k = _in_parts(start, PARTS, BK)
        mask = (n < N)[None, :, None] & (k < K)[:, None, :]
        place = w + n[None, :, None] * K + k[:, None, :]
        w_a = tl.load(place, mask=mask, other=0.0)
        w_b = tl.load(place + N * K, mask=mask, other=0.0)
        inside = (m < M)[None, None, :] & (k < K)[:, :, None]
        v = tl.load(x + m[None, None, :] * K + k[:, :, None], mask=inside, other=0.0)
        a = tl.dot(w_a, v, a, input_precision=PRECISION)
        b = tl.dot(w_b, v, b, input_precision=PRECISION)
    live = (n < N)[:, None] & (m < M)[None, :]
    place = added + m[None, :] * added_row + n[:, None]
    of_a = tl.sum(a, 0) + tl.load(place, mask=live, other=0.0).to(tl.float32)
    of_b = tl.sum(b, 0) + tl.load(place + N, mask=live, other=0.0).to(tl.float32)
    inner = of_b.to(dtype).to(tl.float32)
    inner = (inner / (1.0 + tl.exp(-inner))).to(dtype).to(tl.float32)
    tl.store(y + m[None, :] * N + n[:, None], (of_a.to(dtype).to(tl.float32) + inner).to(dtype), mask=live)


@triton.jit(do_not_specialize=["M"])
def _small_block(
    x, w, added, added_row, bias, y, ahead, M, N: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program holds all of its weights, FIRST inputs and the REST, before the launch before ends. Behind the block's
    programs are those of 2 U outputs more, which are but a product: the cell's."""
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    of_block = tl.program_id(0) < BLOCKS
    size = tl.where(of_block, N, U)
    n, m = tl.where(of_block, 0, -BLOCKS) + tl.program_id(0), tl.arange(0, BM)
    n = n * BN + tl.arange(0, BN)
    line = (n + tl.where(of_block, 0, 2 * N))[None, None, :]
    k = _in_parts(0, PARTS, FIRST)
    mask = (n < size)[None, None, :] & (k < K)[:, :, None]
    place = w + line * K + k[:, :, None]
    w_a = tl.load(place, mask=mask, other=0.0)
    w_b = tl.load(place + size * K, mask=mask, other=0.0)
    if REST > 0:
        last = _in_parts(FIRST, PARTS, REST)
        mask = (n < size)[None, None, :] & (last < K)[:, :, None]
        place = w + line * K + last[:, :, None]
        rest_a = tl.load(place, mask=mask, other=0.0)
        rest_b = tl.load(place + size * K, mask=mask, other=0.0)
    start_early(EARLY)
    live = (m < M)[:, None] & (n < size)[None, :]
    place = added + m[:, None] * added_row + n[None, :]
    of_a = tl.load(place, mask=live & of_block, other=0.0).to(tl.float32)
    of_b = tl.load(place + N, mask=live & of_block, other=0.0).to(tl.float32)
    row = x + m[None, :, None] * K
    v = tl.load(row + k[:, None, :], mask=(m < M)[None, :, None] & (k < K)[:, None, :], other=0.0)
    a = tl.dot(v, w_a, input_precision=PRECISION)
    b = tl.dot(v, w_b, input_precision=PRECISION)
    if REST > 0:
        v = tl.load(row + last[:, None, :], mask=(m < M)[None, :, None] & (last < K)[:, None, :], other=0.0)
        a = tl.dot(v, rest_a, a, input_precision=PRECISION)
        b = tl.dot(v, rest_b, b, input_precision=PRECISION)
    dtype = y.dtype.element_ty
    sum_a, sum_b = tl.sum(a, 0) + of_a, tl.sum(b, 0) + of_b
    if of_block:
        inner = sum_b.to(dtype).to(tl.float32)
        inner = (inner / (1.0 + tl.exp(-inner))).to(dtype).to(tl.float32)
        tl.store(y + m[:, None] * N + n[None, :], (sum_a.to(dtype).to(tl.float32) + inner).to(dtype), mask=live)
    elif U > 0:
        sum_a += tl.load(bias + n, mask=n < U, other=0.0).to(tl.float32)[None, :]
        sum_b += tl.load(bias + U + n, mask=n < U, other=0.0).to(tl.float32)[None, :]
        place = ahead + m[:, None] * (2 * U) + n[None, :]
        tl.store(place, sum_a.to(dtype), mask=live)
        tl.store(place + U, sum_b.to(dtype), mask=live)


def residual_block(x_MK: Tensor, weight_NK: Tensor, added_MN: Tensor) -> Tensor:
    """[M, N]: a + silu(b), a = x Wa^T + ra and b = x Wb^T + rb, M <= MAX_ROWS; a's part of ``weight`` [2 N, K] and of
    ``added`` [M, 2 N] comes first; rows of ``added`` may lie any distance apart, 0 included."""
    (M, K), N = x_MK.shape, weight_NK.shape[0] // 2
    assert x_MK.is_contiguous() and weight_NK.is_contiguous() and M <= MAX_ROWS
    assert added_MN.shape == (M, 2 * N) and added_MN.stride(1) == 1
    y = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    if is_small(x_MK):
        _launch_small(x_MK, weight_NK, added_MN, added_MN, y, y, N, 0)
        return y
    half = y.element_size() == 2
    BM = _block_rows(M)
    _block[(triton.cdiv(N, 16), triton.cdiv(M, BM))](
        x_MK, weight_NK, added_MN, added_MN.stride(0), y, M, N, K, BM, 16, 128 if half else 64, PARTS,
        "tf32" if half else "ieee", num_warps=PARTS, num_stages=6 if half else 3, **early(y),
    )  # fmt: skip
    return y


def is_small(x_MK: Tensor) -> bool:
    """Whether so few rows of so few inputs take the kernel that holds its weights."""
    return x_MK.shape[0] <= SMALL_ROWS and x_MK.shape[1] * x_MK.element_size() <= SMALL_BYTES


def block_and_cell(state_MS: Tensor, weight_NS: Tensor, added_MN: Tensor, bias_3S: Tensor) -> tuple[Tensor, Tensor]:
    """``residual_block`` of small states (``is_small``), and what the cell will add of them, U s + bias [M, 3 S]:
    that does not depend on the tokens the search is about to pick. ``weight``: the block's, then U; S is even."""
    (M, S), width = state_MS.shape, added_MN.shape[1]
    assert is_small(state_MS) and weight_NS.shape == (width + 3 * S, S) and S % 2 == 0 == width % 2
    assert state_MS.is_contiguous() and weight_NS.is_contiguous() and added_MN.stride(1) == 1
    y, ahead = state_MS.new_empty(M, width // 2), state_MS.new_empty(M, 3 * S)
    _launch_small(state_MS, weight_NS, added_MN, bias_3S, y, ahead, width // 2, 3 * S // 2)
    return y, ahead


def _launch_small(
    x_MK: Tensor, weight: Tensor, added_MN: Tensor, bias: Tensor, y: Tensor, ahead: Tensor, N: int, U: int
) -> None:
    M, K = x_MK.shape
    first = max(16 * SMALL_PARTS, 1 << (K.bit_length() - 1))
    rest = 0 if first >= K else max(16 * SMALL_PARTS, triton.next_power_of_2(K - first))
    _small_block[(triton.cdiv(N, 8) + triton.cdiv(U, 8),)](
        x_MK, weight, added_MN, added_MN.stride(0), bias, y, ahead, M, N, K, U, SMALL_ROWS, 8, first, rest,
        SMALL_PARTS, "tf32" if y.element_size() == 2 else "ieee", num_warps=SMALL_PARTS, **early(y),
    )  # fmt: skip


def _block_rows(rows: int) -> int:
    return max(16, min(BLOCK_ROWS, triton.next_power_of_2(rows)))
