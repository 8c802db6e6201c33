"""Matrix products of few rows: as fast as their weights can be read, with the work around them in the same launch.

    y = residual + act(scale * (x * g) W^T + bias)        scale = 1 / rms(x), or 1
    y = silu(scale * (x * g) Wg^T) * (scale * (x * g) Wu^T)                      ``pair="gated"``
    y = a + silu(b),  a = x Wa^T + ra,  b = x Wb^T + rb                          ``pair="block"``

The norm costs nothing: its weight multiplies x on the way in and its scale, one number per row, the sums on the way
out. Measured on one H200, weights of the Llama-2-7B shape in bfloat16: one row 4.0 TB/s against cuBLAS' 3.6 (o_proj:
3.5 against 2.5), of 4.6 that a kernel which only reads reaches.

Letters: M rows, N outputs, K inputs, R beams, S state.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early

MAX_ROWS = 128
"""More rows than this are compute-bound sooner than bandwidth-bound: leave them to cuBLAS."""


@triton.jit
def _finish(
    acc, n, row, live, bias, residual, residual_row, y, N,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """acc [.., ..] float32 with column indices ``n`` and row indices ``row``: bias, activation, residual, store."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    if SILU:
        acc = acc.to(dtype).to(tl.float32)
        acc = acc / (1.0 + tl.exp(-acc))
    place = row.to(tl.int64) * N + n
    if RESIDUAL:
        added = tl.load(residual + row.to(tl.int64) * residual_row + n, mask=live, other=0.0)
        acc = acc.to(dtype).to(tl.float32) + added.to(tl.float32)
    tl.store(y + place, acc.to(dtype), mask=live)


@triton.jit
def _paired(acc, up, n, row, live, residual, residual_row, dtype: tl.constexpr, N, PAIR: tl.constexpr):
    """One sum of two: gate and up (PAIR 1), or the two of a residual block with what is added to each (2)."""
    if PAIR == 2:
        place = residual + row.to(tl.int64) * residual_row + n
        acc += tl.load(place, mask=live, other=0.0).to(tl.float32)
        up += tl.load(place + N, mask=live, other=0.0).to(tl.float32)
    first = acc.to(dtype).to(tl.float32)
    second = up.to(dtype).to(tl.float32)
    if PAIR == 2:
        return first + (second / (1.0 + tl.exp(-second))).to(dtype).to(tl.float32)
    return (first / (1.0 + tl.exp(-first))).to(dtype).to(tl.float32) * second


@triton.jit
def _gemv(
    x, w, gain, bias, residual, residual_row, y, N: tl.constexpr, K: tl.constexpr, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row. A program reads BN weight rows, BK columns at a time."""
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = n.to(tl.int64) * K
    acc = tl.zeros((BN, BK), tl.float32)
    up = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    dtype = x.dtype.element_ty
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        v = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM > 0:
            squares += v * v
        if NORM == 2:
            v = (v * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        mask = (n < N)[:, None] & inside[None, :]
        acc += tl.load(w + row[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32) * v[None, :]
        if PAIR > 0:
            second = w + N * K
            up += tl.load(second + row[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32) * v[None, :]
    y_n = tl.sum(acc, 1)
    scale = 1.0
    if NORM > 0:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y_n *= scale
    if PAIR > 0:
        y_n = _paired(y_n, tl.sum(up, 1) * scale, n, n * 0, n < N, residual, residual_row, dtype, N, PAIR)
    _finish(y_n, n, n * 0, n < N, bias, residual, residual_row, y, N, HAS_BIAS, SILU, RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x, w, gain, bias, residual, residual_row, y, partial, arrived, M, N: tl.constexpr, K: tl.constexpr, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """M <= BM rows. A program multiplies BN weight rows with all of x over one of SPLIT parts of K; the last one to
    arrive adds the parts in their order, so that the sum does not depend on who is last."""
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    row = n.to(tl.int64) * K
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    dtype = x.dtype.element_ty
    steps: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT
    for step in range(steps):
        k = (part * steps + step) * BK + tl.arange(0, BK)
        inside = k < K
        v = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        if NORM > 0:
            squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 0)
        if NORM == 2:
            v = (v.to(tl.float32) * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)[:, None]).to(dtype)
        mask = (n < N)[:, None] & inside[None, :]
        acc = tl.dot(tl.load(w + row[:, None] + k[None, :], mask=mask, other=0.0), v, acc, input_precision=PRECISION)
        if PAIR > 0:
            second = w + N * K
            up = tl.dot(
                tl.load(second + row[:, None] + k[None, :], mask=mask, other=0.0), v, up, input_precision=PRECISION
            )
    place = n.to(tl.int64)[:, None] + m[None, :] * N
    live = (n < N)[:, None] & (m < M)[None, :]
    last = True
    if SPLIT > 1:
        size = M * N
        tl.store(partial + part * size + place, acc, mask=live)
        tl.debug_barrier()  # every thread's part lies in memory before this program says so
        last = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for other in range(SPLIT):
                acc += tl.load(partial + other * size + place, mask=live, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tl.program_id(0), 0)
        if NORM > 0:
            scale = tl.rsqrt(squares / K + eps)[None, :]
            acc *= scale
            up *= scale
        column, line = n[:, None] + 0 * m[None, :], m[None, :] + 0 * n[:, None]
        if PAIR > 0:
            acc = _paired(acc, up, column, line, live, residual, residual_row, dtype, N, PAIR)
        _finish(acc, column, line, live, bias, residual, residual_row, y, N,
                HAS_BIAS, SILU, RESIDUAL)  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def _gru(
    gates, index, index_row, state, parent, u, bias, y, R, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    PARENT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """New state of R = B x W beams: the input's part of the gates is row ``index`` of a table, the old state that of
    beam ``parent`` of the P that this one's row had, or of the same beam."""
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    alive = r < R
    row = r // W
    source = row * P + tl.load(parent + r, mask=alive, other=0) if PARENT else r
    dtype = state.dtype.element_ty
    reset = tl.zeros((BN, BR), tl.float32)
    keep = tl.zeros((BN, BR), tl.float32)
    new = tl.zeros((BN, BR), tl.float32)
    for start in range(0, S, BK):
        k = start + tl.arange(0, BK)
        v = tl.load(state + source[None, :] * S + k[:, None], mask=alive[None, :] & (k < S)[:, None], other=0.0)
        mask = (n < S)[:, None] & (k < S)[None, :]
        place = u + n[:, None] * S + k[None, :]
        reset = tl.dot(tl.load(place, mask=mask, other=0.0), v, reset, input_precision=PRECISION)
        keep = tl.dot(tl.load(place + S * S, mask=mask, other=0.0), v, keep, input_precision=PRECISION)
        new = tl.dot(tl.load(place + 2 * S * S, mask=mask, other=0.0), v, new, input_precision=PRECISION)
    live = (n < S)[:, None] & alive[None, :]
    column = n[:, None] + 0 * r[None, :]
    token = tl.load(index + row * index_row + r % W, mask=alive, other=0)
    table = gates + token[None, :] * (3 * S) + column
    reset += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    keep += tl.load(bias + S + column, mask=live, other=0.0).to(tl.float32)
    new += tl.load(bias + 2 * S + column, mask=live, other=0.0).to(tl.float32)
    reset = tl.sigmoid(reset.to(dtype).to(tl.float32) + tl.load(table, mask=live, other=0.0).to(tl.float32))
    keep = tl.sigmoid(keep.to(dtype).to(tl.float32) + tl.load(table + S, mask=live, other=0.0).to(tl.float32))
    z = tl.load(table + 2 * S, mask=live, other=0.0).to(tl.float32) + reset * new.to(dtype).to(tl.float32)
    candidate = 2.0 * tl.sigmoid(2.0 * z) - 1.0  # tanh
    old = tl.load(state + source[None, :] * S + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + r[None, :] * S + column, ((1.0 - keep) * candidate + keep * old).to(dtype), mask=live)


PAIRS = {None: 0, "gated": 1, "block": 2}


class Norm(NamedTuple):
    """x / rms(x) * weight; without a weight, x / rms(x)."""

    weight: Tensor | None  # [K]
    eps: float


class _Plan(NamedTuple):
    BN: int
    BK: int
    split: int
    warps: int
    stages: int


def _plan(M: int, N: int, K: int, whole: bool, paired: bool) -> _Plan:
    """Block sizes that read fastest on an H200, by a search over the shapes of Llama-2-7B and SmolLM2-135M."""
    if M == 1:
        if K >= 8192:
            return _Plan(1, 512, 1, 2, 1)
        if K >= 2048:
            if paired:
                return _Plan(4, 1024, 1, 4, 1)
            return _Plan(2, 2048, 1, 8, 1) if N > 8192 else _Plan(1, 1024, 1, 8, 1)
        return _Plan(4, min(1024, triton.next_power_of_2(K)), 1, 4, 1)
    if K < 2048:
        if M <= 16 and N <= 4096:
            return _Plan(16, 128, 1, 4, 4)
        return _Plan(32 if N <= 4096 else 64, 64, 1, 4, 4)
    split = 1
    if not whole:
        while triton.cdiv(N, 64) * split < 132 and split < 4:
            split *= 2
    return _Plan(64, 64, split, 4, 5)


class Workspace:
    """Room for the parts of split sums, one per device, and counters that every launch leaves at zero."""

    def __init__(self, device: torch.device, floats: int = 4 * MAX_ROWS * 16384, counters: int = 8192) -> None:
        self.partial = torch.empty(floats, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(counters, dtype=torch.int32, device=device)
        self.ready: tuple[Tensor, Any] | None = None
        """the residual stream that a layer left last, and what the norm behind it needs (``stream.Scaled``)"""


def few_rows(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_MN: Tensor | None = None,
    pair: Literal["gated", "block"] | None = None,
    silu: bool = False,
    workspace: Workspace | None = None,
    plan: _Plan | None = None,
) -> Tensor:
    """[M, N] as the module's docstring says; M <= MAX_ROWS; rows of ``residual_MN`` may lie any distance apart, 0
    included; with ``pair`` the weight is [2 N, K], gates or a's part first, and of a block the residual [M, 2 N] too.

    bfloat16 is rounded where transformers rounds it, but for the norm: there the product of x and its weight is
    rounded before the division by rms(x) instead of after it. Without a workspace sums are not split.
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0] // (2 if pair else 1)
    assert x_MK.is_contiguous() and weight_NK.is_contiguous() and M <= MAX_ROWS
    assert pair != "block" or (norm is bias_N is None and residual_MN is not None and residual_MN.shape[1] == 2 * N)
    y = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    kind = 0 if norm is None else 1 if norm.weight is None else 2
    gain = x_MK if norm is None or norm.weight is None else norm.weight
    eps = 0.0 if norm is None else norm.eps
    plan = plan or _plan(M, N, K, pair is not None or norm is not None, pair is not None)
    flags = (kind, PAIRS[pair], bias_N is not None, silu, residual_MN is not None and pair != "block")
    residual = x_MK if residual_MN is None else residual_MN
    assert residual.stride(1) == 1
    tensors = (x_MK, weight_NK, gain, x_MK if bias_N is None else bias_N, residual, residual.stride(0))
    if M == 1:
        cut = (plan.BN, plan.BK)
        _gemv[(triton.cdiv(N, plan.BN),)](*tensors, y, N, K, eps, *flags, *cut, num_warps=plan.warps, **early(y))
        return y
    split = plan.split if workspace is not None else 1
    grid = (triton.cdiv(N, plan.BN), split)
    partial, arrived = (y, y) if workspace is None else (workspace.partial, workspace.arrived)
    precision = "ieee" if x_MK.dtype == torch.float32 else "tf32"
    BM = max(16, triton.next_power_of_2(M))
    _skinny[grid](
        *tensors, y, partial, arrived, M, N, K, eps, *flags, BM, plan.BN, plan.BK, split, precision,
        num_warps=plan.warps, num_stages=plan.stages, **early(y),
    )  # fmt: skip
    return y


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
    BR = max(16, triton.next_power_of_2(R))
    precision = "ieee" if y.dtype == torch.float32 else "tf32"
    parent = index_BW if parent_BW is None else parent_BW
    few = BR <= 32 and y.element_size() == 2  # a deeper block would not fit
    _gru[(triton.cdiv(S, 16),)](
        gates_V3S, index_BW, index_BW.stride(0), state_BPS, parent, u_3SS, bias_3S, y, R, width, before, S,
        parent_BW is not None, BR, 16, 256 if few else 64, precision,
        num_warps=2 if few else 4, num_stages=4, **early(y),
    )  # fmt: skip
    return y
