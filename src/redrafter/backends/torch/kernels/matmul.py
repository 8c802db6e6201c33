"""Matrix products of few rows: as fast as their weights can be read, with the work around them in the same launch.

    y = residual + act(scale * (x * g) W^T + bias)        scale = 1 / rms(x), or 1
    y = silu(scale * (x * g) Wg^T) * (scale * (x * g) Wu^T)                      ``gated``

The norm costs nothing: its weight multiplies x on the way in and its scale, one number per row, the sums on the way
out. Measured on one H200, weights of the Llama-2-7B shape in bfloat16: one row 4.0 TB/s against cuBLAS' 3.6 (o_proj:
3.5 against 2.5), of 4.6 that a kernel which only reads reaches.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early

MAX_ROWS = 128
"""More rows than this are compute-bound sooner than bandwidth-bound: leave them to cuBLAS."""
AHEAD_BYTES = 8 << 20
"""Up to so many bytes of weights are read for one row before the launch before ends. SmolLM2-135M on one H200: 13.7 us
a layer, 11.9 with it. Larger ones lose: 3 us a layer of the 7B shape."""


@triton.jit
def _finish(
    acc, n, row, live, bias, added, y, N, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """acc [.., ..] float32 with column indices ``n`` and row indices ``row``: bias, activation, ``added``, store."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    if SILU:
        acc = acc.to(dtype).to(tl.float32)
        acc = acc / (1.0 + tl.exp(-acc))
    place = row.to(tl.int64) * N + n
    if RESIDUAL:
        acc = acc.to(dtype).to(tl.float32) + added.to(tl.float32)
    tl.store(y + place, acc.to(dtype), mask=live)


@triton.jit
def gated_by(gate, up, dtype: tl.constexpr):
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)


@triton.jit
def gated_pairs(acc, OUTPUTS: tl.constexpr, BM: tl.constexpr, dtype: tl.constexpr):
    """[OUTPUTS, BM] of sums [2 OUTPUTS, BM], gates and ups in turn."""
    gate, up = tl.split(tl.reshape(tl.trans(acc), (BM, OUTPUTS, 2)))
    return tl.trans(gated_by(gate, up, dtype))


@triton.jit
def _gemv(
    x, w, gain, bias, residual, y, N: tl.constexpr, K: tl.constexpr, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row. A program reads BN weight rows, BK columns at a time, or AHEAD of its predecessor's end all of them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ROWS: tl.constexpr = 2 * BN if GATED else BN
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = line < (2 * N if GATED else N)
    row = line.to(tl.int64) * K
    if AHEAD:
        mask = exists[:, None] & (tl.arange(0, BK) < K)[None, :]
        w_ahead = tl.load(w + row[:, None] + tl.arange(0, BK)[None, :], mask=mask, other=0.0)
    start_early(EARLY)
    added = 0.0
    if RESIDUAL:
        added = tl.load(residual + n, mask=n < N, other=0.0)
    acc = tl.zeros((ROWS, BK), tl.float32)
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
        mask = exists[:, None] & inside[None, :]
        w_k = w_ahead if AHEAD else tl.load(w + row[:, None] + k[None, :], mask=mask, other=0.0)
        acc += w_k.to(tl.float32) * v[None, :]
    y_n = tl.sum(acc, 1)
    if NORM > 0:
        y_n *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if GATED:
        gate, up = tl.split(tl.reshape(y_n, (BN, 2)))
        y_n = gated_by(gate, up, dtype)
    _finish(y_n, n, n * 0, n < N, bias, added, y, N, HAS_BIAS, SILU, RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _skinny(
    x, w, gain, bias, residual, residual_row, y, partial, arrived, M, N: tl.constexpr, K: tl.constexpr, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M <= BM rows. A program multiplies BN weight rows with all of x over one of SPLIT parts of K; the last one to
    arrive adds the parts in their order, so that the sum does not depend on who is last."""
    start_early(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    ROWS: tl.constexpr = 2 * BN if GATED else BN
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = line.to(tl.int64) * K
    acc = tl.zeros((ROWS, BM), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    dtype = x.dtype.element_ty
    steps: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT
    for step in range(steps):
        block = part * steps + (steps - 1 - step if BACKWARDS else step)
        k = block * BK + tl.arange(0, BK)
        inside = k < K
        v = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        if NORM > 0:
            squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 0)
        if NORM == 2:
            v = (v.to(tl.float32) * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)[:, None]).to(dtype)
        mask = (line < (2 * N if GATED else N))[:, None] & inside[None, :]
        acc = tl.dot(tl.load(w + row[:, None] + k[None, :], mask=mask, other=0.0), v, acc, input_precision=PRECISION)
    place = n.to(tl.int64)[:, None] + m[None, :] * N
    live = (n < N)[:, None] & (m < M)[None, :]
    if NORM > 0:
        scale = tl.rsqrt(squares / K + eps)[None, :]
    if GATED:  # in one part
        acc = gated_pairs(acc * scale if NORM > 0 else acc, BN, BM, dtype)
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
        if NORM > 0 and not GATED:
            acc *= scale
        column, of_x = n[:, None] + 0 * m[None, :], m[None, :] + 0 * n[:, None]
        added = 0.0
        if RESIDUAL:
            added = tl.load(residual + of_x.to(tl.int64) * residual_row + column, mask=live, other=0.0)
        _finish(acc, column, of_x, live, bias, added, y, N, HAS_BIAS, SILU, RESIDUAL)


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


def _plan(M: int, N: int, K: int, whole: bool, gated: bool) -> _Plan:
    """Block sizes that read fastest on an H200, by a search over the shapes of Llama-2-7B and SmolLM2-135M."""
    if M == 1:
        if K >= 8192:
            return _Plan(1, 512, 1, 2, 1)
        if K >= 2048:
            if gated:
                return _Plan(4, 1024, 1, 4, 1)
            return _Plan(2, 2048, 1, 8, 1) if N > 8192 else _Plan(1, 1024, 1, 8, 1)
        return _Plan(4, triton.next_power_of_2(K), 1, 4, 1)
    if K < 2048:
        if M <= 16 and N <= 4096:
            return _Plan(16, 128, 1, 4, 4)
        if M <= 16:
            return _Plan(64, 128, 1, 4, 4 if K >= 1024 else 5)
        if M <= 32 and N > 4096:
            return _Plan(64, 128, 1, 4, 4)
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
    gated: bool = False,
    silu: bool = False,
    workspace: Workspace | None = None,
    plan: _Plan | None = None,
    backwards: bool = False,
) -> Tensor:
    """[M, N] as the module's docstring says; M <= MAX_ROWS; rows of ``residual_MN`` may lie any distance apart, 0
    included; with ``gated`` the weight is [2 N, K], gates and ups in turn (``rotate.interleaved``).

    bfloat16 is rounded where transformers rounds it, but for the norm: there the product of x and its weight is
    rounded before the division by rms(x) instead of after it. Without a workspace sums are not split. ``backwards``:
    of more than one row, weights are read from the end of their rows, where the L2 cache may hold what a product with
    the same weights read last.
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0] // (2 if gated else 1)
    assert x_MK.is_contiguous() and weight_NK.is_contiguous() and M <= MAX_ROWS
    y = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    kind = 0 if norm is None else 1 if norm.weight is None else 2
    gain = x_MK if norm is None or norm.weight is None else norm.weight
    eps = 0.0 if norm is None else norm.eps
    plan = plan or _plan(M, N, K, gated or norm is not None, gated)
    flags = (kind, gated, bias_N is not None, silu, residual_MN is not None)
    residual = x_MK if residual_MN is None else residual_MN
    assert residual.stride(1) == 1
    tensors = (x_MK, weight_NK, gain, x_MK if bias_N is None else bias_N, residual)
    if M == 1:
        cut = (plan.BN, plan.BK, K <= plan.BK and weight_NK.nbytes <= AHEAD_BYTES)
        _gemv[(triton.cdiv(N, plan.BN),)](*tensors, y, N, K, eps, *flags, *cut, num_warps=plan.warps, **early(y))
        return y
    split = plan.split if workspace is not None else 1
    grid = (triton.cdiv(N, plan.BN), split)
    partial, arrived = (y, y) if workspace is None else (workspace.partial, workspace.arrived)
    precision = "ieee" if x_MK.dtype == torch.float32 else "tf32"
    BM = max(16, triton.next_power_of_2(M))
    _skinny[grid](
        *tensors, residual.stride(0), y, partial, arrived, M, N, K, eps, *flags,
        BM, plan.BN, plan.BK, split, precision, backwards,
        num_warps=plan.warps, num_stages=plan.stages, **early(y),
    )  # fmt: skip
    return y
