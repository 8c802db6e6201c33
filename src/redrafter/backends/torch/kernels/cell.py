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
    x, w, added, added_row, y, M, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program holds all of its weights, FIRST inputs and the REST, before the launch before ends."""
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    k = _in_parts(0, PARTS, FIRST)
    mask = (n < N)[None, None, :] & (k < K)[:, :, None]
    place = w + n[None, None, :] * K + k[:, :, None]
    w_a = tl.load(place, mask=mask, other=0.0)
    w_b = tl.load(place + N * K, mask=mask, other=0.0)
    if REST > 0:
        last = _in_parts(FIRST, PARTS, REST)
        mask = (n < N)[None, None, :] & (last < K)[:, :, None]
        place = w + n[None, None, :] * K + last[:, :, None]
        rest_a = tl.load(place, mask=mask, other=0.0)
        rest_b = tl.load(place + N * K, mask=mask, other=0.0)
    start_early(EARLY)
    live = (m < M)[:, None] & (n < N)[None, :]
    place = added + m[:, None] * added_row + n[None, :]
    of_a = tl.load(place, mask=live, other=0.0).to(tl.float32)
    of_b = tl.load(place + N, mask=live, other=0.0).to(tl.float32)
    row = x + m[None, :, None] * K
    v = tl.load(row + k[:, None, :], mask=(m < M)[None, :, None] & (k < K)[:, None, :], other=0.0)
    a = tl.dot(v, w_a, input_precision=PRECISION)
    b = tl.dot(v, w_b, input_precision=PRECISION)
    if REST > 0:
        v = tl.load(row + last[:, None, :], mask=(m < M)[None, :, None] & (last < K)[:, None, :], other=0.0)
        a = tl.dot(v, rest_a, a, input_precision=PRECISION)
        b = tl.dot(v, rest_b, b, input_precision=PRECISION)
    dtype = y.dtype.element_ty
    inner = (tl.sum(b, 0) + of_b).to(dtype).to(tl.float32)
    inner = (inner / (1.0 + tl.exp(-inner))).to(dtype).to(tl.float32)
    outer = (tl.sum(a, 0) + of_a).to(dtype).to(tl.float32)
    tl.store(y + m[:, None] * N + n[None, :], (outer + inner).to(dtype), mask=live)


def residual_block(x_MK: Tensor, weight_NK: Tensor, added_MN: Tensor) -> Tensor:
    """[M, N]: a + silu(b), a = x Wa^T + ra and b = x Wb^T + rb, M <= MAX_ROWS; a's part of ``weight`` [2 N, K] and of
    ``added`` [M, 2 N] comes first; rows of ``added`` may lie any distance apart, 0 included."""
    (M, K), N = x_MK.shape, weight_NK.shape[0] // 2
    assert x_MK.is_contiguous() and weight_NK.is_contiguous() and M <= MAX_ROWS
    assert added_MN.shape == (M, 2 * N) and added_MN.stride(1) == 1
    y = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    half = y.element_size() == 2
    tensors = (x_MK, weight_NK, added_MN, added_MN.stride(0), y)
    precision = "tf32" if half else "ieee"
    if M <= SMALL_ROWS and K * y.element_size() <= SMALL_BYTES:
        first = max(16 * SMALL_PARTS, 1 << (K.bit_length() - 1))
        rest = 0 if first >= K else max(16 * SMALL_PARTS, triton.next_power_of_2(K - first))
        _small_block[(triton.cdiv(N, 8),)](
            *tensors, M, N, K, SMALL_ROWS, 8, first, rest, SMALL_PARTS, precision, num_warps=SMALL_PARTS, **early(y)
        )
        return y
    BM = _block_rows(M)
    _block[(triton.cdiv(N, 16), triton.cdiv(M, BM))](
        *tensors, M, N, K, BM, 16, 128 if half else 64, PARTS, precision,
        num_warps=PARTS, num_stages=6 if half else 3, **early(y),
    )  # fmt: skip
    return y


def _block_rows(rows: int) -> int:
    return max(16, min(BLOCK_ROWS, triton.next_power_of_2(rows)))
