"""Matrix products of 2 to 64 rows in the tensor cores, with the work around them in the same launch.

    y = residual + (scale * (x * g) W^T + bias)
    y = silu(scale * (x * g) Wg^T) * (scale * (x * g) Wu^T)          scale = 1 / rms(x), or 1
    q = turned(scale * (x * g) Wq^T + bias), k and v to the cache     (``rotate.py``)

Large weights come through the tensor memory accelerator (Hopper; elsewhere triton reads them by pointers). A product
that writes the residual stream also writes what the norm behind it needs: x * g, and of every tile of columns the sum
of the squares of each row, which the next product adds in the tiles' order. So a decoder layer of many rows takes five
launches (``layer.py``), none of them for a norm. Slow twin: cuBLAS with ``norms.py`` between.

Measured on one H200, 64 rows, weights of the Llama-2-7B shape in bfloat16, products alone: q|k|v 28.5 us (cuBLAS 30.2),
gate|up 48.3 (50.2), out 13.3 (12.4), down 28.7 (29.9); together 3.4 us less with x first. In the shape of SmolLM2-135M
a product's time is latency, not bytes: by pointers, with what does not depend on the launch before on its way earlier,
a layer of 48 rows takes 19.0 us instead of 22.7.

Letters: M rows, N outputs, K inputs, T tiles of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from redrafter.backends.torch.kernels.early import early, late, start_early, tell
from redrafter.backends.torch.kernels.matmul import Workspace, gated_pairs
from redrafter.backends.torch.kernels.rotate import Rotation, rotate_write
from redrafter.backends.torch.kernels.tall import block_rows, fetched, tall

MAX_ROWS = 64
SMALL_ROWS = 128
"""The same where no weight has more than ``EARLY_BYTES``. Layer of SmolLM2-135M, 128 rows, on one H200: 26.8 us; with
cuBLAS 29.9."""
EARLY_BYTES = 8 << 20
"""Of a weight: larger ones lose more to a successor that occupies the multiprocessors early than it gains."""


class Scaled(NamedTuple):
    """An input that is yet to be divided by its root mean square."""

    values: Tensor  # [M, K] x * g, rounded
    squares: Tensor  # [T, M] float32: sums of x^2 over each tile of columns
    eps: float


class Cut(NamedTuple):
    """How a launch is cut: columns and depth of a block, parts of K that are summed, warps, blocks on their way.

    A tensor core multiplies 64 rows by any multiple of 8. Those 64 are weight rows, or if ``x_first`` rows of x, which
    allows blocks of fewer weight rows: enough programs for every multiprocessor without parts to be added up."""

    BN: int
    BK: int
    split: int
    warps: int
    stages: int
    x_first: bool = False
    ahead: bool = False
    """of small products: read by pointers, and weights are brought into the L2 cache before the launch before ends"""
    late: bool = False
    """of large products: the launch behind may start when the sums are done (``early.late``)"""


def plan(M: int, N: int, K: int, gated: bool) -> Cut:
    """Fastest in a search over the shapes of Llama-2-7B and SmolLM2-135M at 16 and 64 rows (benchmarks/gpu/cuts.py)."""
    few = M <= 32
    if K < 2048:
        small = 2 * N * K * (2 if gated else 1) <= EARLY_BYTES
        return _small_plan(M, K, gated) if small else _narrow_plan(few, K, gated)
    if N < 2048 and not gated:
        return Cut(32, 256, 4, 4, 4, x_first=not few)
    if gated:
        return Cut(128, 128, 1, 4, 3) if few else Cut(64, 64, 1, 4, 4, x_first=True, late=True)
    if N > 8192:
        return Cut(64, 128, 1, 4, 4) if few else Cut(128, 128, 1, 8, 4, x_first=True, late=True)
    if few:
        return Cut(64, 256, 1, 4, 4) if K <= 4096 else Cut(32, 256, 1, 4, 6)
    return Cut(32, 256, 1, 4, 4, x_first=True, late=True)


def _small_plan(M: int, K: int, gated: bool) -> Cut:
    few = M <= 32
    if M > MAX_ROWS:
        return Cut(16, 64, 1, 4, 9, x_first=True, ahead=True)
    if K > 1024 and not gated:
        return Cut(16, 256, 2, 2, 4, ahead=True) if few else Cut(16, 128, 1, 4, 8, x_first=True, ahead=True)
    if not few:
        return Cut(16, 128, 1, 4, 4, x_first=True, ahead=True)
    if gated:
        return Cut(16, 128, 1, 4, 5, ahead=True)
    return Cut(16, 256, 1, 2, 4, ahead=True) if M <= 16 else Cut(16, 64, 1, 4, 9, ahead=True)


def _narrow_plan(few: bool, K: int, gated: bool) -> Cut:
    """Few inputs, but too many outputs to start early."""
    if K > 1024 and not gated:
        return Cut(16, 256, 3, 2, 4) if few else Cut(16, 256, 2, 4, 4, x_first=True)
    if few:
        return Cut(64, 128, 1, 4, 4) if gated else Cut(16, 256, 1, 2, 4)
    return Cut(16, 128, 1, 4, 4, x_first=True)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _block_of(
    a, row, k, room, K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, POINTERS: tl.constexpr,
    ROWS_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr,
):  # fmt: skip
    """[ROWS, BK] of a matrix of K columns from (row, k) on; ``a`` describes it, or points to it, with zeros behind its
    ``room`` rows and its columns unless they FIT."""
    if POINTERS:
        r = (row + tl.arange(0, ROWS))[:, None]
        column = (k + tl.arange(0, BK))[None, :]
        if ROWS_FIT and COLUMNS_FIT:
            block = tl.load(a + r * K + column)
        elif ROWS_FIT:
            block = tl.load(a + r * K + column, mask=column < K, other=0.0)
        else:
            block = tl.load(a + r * K + column, mask=(column < K) & (r < room), other=0.0)
    else:
        block = a.load([row, k])
    return block


@triton.jit
def _sums(
    x, w, row, first, M, steps: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, X_FIRST: tl.constexpr, PRECISION: tl.constexpr, POINTERS: tl.constexpr,
    TALL: tl.constexpr, FIT: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """[BN, BM]: BN weight rows of N from ``row`` on times x over ``steps`` blocks from ``first`` on."""
    acc = tl.zeros((BM, BN) if X_FIRST else (BN, BM), tl.float32)
    for step in range(steps):
        k = first + step * BK
        v = _block_of(x, 0, k, M, K, BM, BK, POINTERS, TALL, FIT)
        of_w = _block_of(w, row, k, N, K, BN, BK, POINTERS, N % BN == 0, FIT)
        if X_FIRST:
            acc = tl.dot(v, tl.trans(of_w), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(of_w, tl.trans(v), acc, input_precision=PRECISION)
    tell(LATE)
    if X_FIRST:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _bring(w, row, first, K: tl.constexpr, BN: tl.constexpr, LENGTH: tl.constexpr):
    """BN rows, LENGTH numbers of 16 bits each from column ``first`` on, to the L2 cache, by lines of 128 bytes."""
    line = tl.arange(0, triton.next_power_of_2((LENGTH + 63) // 64))
    column = tl.minimum(first + 64 * line, K - 1)
    place = w + (row + tl.arange(0, BN))[:, None] * K + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _added(mine, size, BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr):
    """The parts of a sum, in their order."""
    acc = tl.zeros((BN, BM), tl.float32)
    for other in range(SPLIT):
        acc += tl.load(mine + other * size, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["M", "tiles"])
def _stream(
    x, w, squares, bias, residual, gain, y, scaled, squares_out, partial, arrived, rotation, M, tiles, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, TILES_P: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, X_FIRST: tl.constexpr, AHEAD: tl.constexpr, TALL: tl.constexpr, LATE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program multiplies BN weight rows with all of x over one of SPLIT parts of K; the last one to arrive adds the
    parts in their order, so that the sum does not depend on who is last."""
    tile, part = tl.program_id(0), tl.program_id(1)
    steps: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT
    ROWS: tl.constexpr = 2 * BN if GATED else BN
    ALL: tl.constexpr = 2 * N if GATED else N
    first = part * steps * BK
    if AHEAD and EARLY and N % BN == 0:
        _bring(w, tile * ROWS, first, K, ROWS, steps * BK)
    start_early(EARLY, LATE)
    dtype: tl.constexpr = y.dtype.element_ty
    m, n = tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    if NORM:  # on its way while weights are multiplied
        t = tl.arange(0, TILES_P)
        read = (t < tiles)[:, None] & (m < M)[None, :]
        sums = tl.load(squares + t[:, None] * M + m[None, :], mask=read, other=0.0)
    place = n.to(tl.int64)[:, None] + m[None, :] * N
    live = (n < N)[:, None] & (m < M)[None, :]
    SOON: tl.constexpr = X_FIRST or AHEAD  # few rows of wide products lose by it
    if RESIDUAL and SOON:
        added_soon = tl.load(residual + place, mask=live, other=0.0)
    if SCALED and SOON:
        gain_soon = tl.load(gain + n, mask=n < N, other=0.0)
    acc = _sums(
        x, w, tile * ROWS, first, M, steps, ALL, K, BM, ROWS, BK, X_FIRST, PRECISION, AHEAD, TALL,
        SPLIT * steps * BK == K, LATE,
    )  # fmt: skip
    if NORM:
        scale = tl.rsqrt(tl.sum(sums, 0) / K + eps)[None, :]
    if GATED:  # in one part
        acc = gated_pairs(acc * scale if NORM else acc, BN, BM, dtype)
    last = True
    if SPLIT > 1:
        # As the tensor cores leave it: nothing is turned around on its way out and in.
        block = tl.arange(0, BN)[:, None] * BM + m[None, :]
        size = tl.num_programs(0) * (BN * BM)
        mine = partial + tile * (BN * BM) + block
        tl.store(mine + part * size, acc)
        tl.debug_barrier()  # every thread's part lies in memory before this program says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = _added(mine, size, BN, BM, SPLIT)
            tl.store(arrived + tile, 0)
        if NORM and not GATED:
            acc *= scale
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if RESIDUAL:
            added = added_soon if SOON else tl.load(residual + place, mask=live, other=0.0)
            acc = _rounded(acc, dtype) + added.to(tl.float32)
        if WIDTH > 0:
            rotate_write(acc, y, rotation, tile, M, HEADS, KV_HEADS, WIDTH, BM, BN)
        else:
            tl.store(y + place, acc.to(dtype), mask=live)
        if SCALED:
            acc = tl.where(live, _rounded(acc, dtype), 0.0)
            tl.store(squares_out + tile * M + m, tl.sum(acc * acc, 0), mask=m < M)
            g = (gain_soon if SOON else tl.load(gain + n, mask=n < N, other=0.0)).to(tl.float32)
            tl.store(scaled + place, (acc * g[:, None]).to(dtype), mask=live)


def stream(
    x: Tensor | Scaled,
    weight: Tensor,
    bias_N: Tensor | None = None,
    *,
    workspace: Workspace,
    residual_MN: Tensor | None = None,
    gated: bool = False,
    norm: tuple[Tensor, float] | None = None,
    rotation: Rotation | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Scaled | None]:
    """[M, N] as the module's docstring says, and with ``norm`` (weight, eps) what the norm behind it needs. ``weight``
    [N, K], with ``gated`` [2 N, K], gates and ups in turn; with ``rotation`` that of q|k|v, and only q [M, H * d] comes
    back. All contiguous, M <= ``most_rows``; ``fits`` says what is taken."""
    values = x.values if isinstance(x, Scaled) else x
    M, K = values.shape
    N = weight.shape[0] // (2 if gated else 1)
    assert values.is_contiguous() and weight.is_contiguous() and most_rows(weight) >= M
    assert residual_MN is None or residual_MN.is_contiguous()
    cut = cut or plan(M, N, K, gated)
    tiles = triton.cdiv(N, cut.BN)
    turned, sizes = ((), (0, 0, 0)) if rotation is None else rotation.arguments(N)
    y = tall((M, sizes[0] * sizes[2] or N), values)
    behind = None
    if norm is not None:
        squares = torch.empty(tiles, M, dtype=torch.float32, device=values.device)
        behind = Scaled(tall((M, N), values), squares, norm[1])
    BM = block_rows(M)
    assert cut.split == 1 or (not gated and cut.split * tiles * cut.BN * BM <= len(workspace.partial))
    tiles_in = len(x.squares) if isinstance(x, Scaled) else 0
    held = fetched(values)
    described = (
        TensorDescriptor(values, [held, K], [K, 1], [BM, cut.BK]),
        TensorDescriptor.from_tensor(weight, [cut.BN * (2 if gated else 1), cut.BK]),
    )
    _stream[(tiles, cut.split)](
        *((values, weight) if cut.ahead else described),
        x.squares if isinstance(x, Scaled) else y, y if bias_N is None else bias_N,
        y if residual_MN is None else residual_MN, y if norm is None else norm[0],
        y, y if behind is None else behind.values, y if behind is None else behind.squares,
        workspace.partial, workspace.arrived, turned, M, tiles_in, x.eps if isinstance(x, Scaled) else 0.0,
        *sizes, N, K, BM, cut.BN, cut.BK, cut.split, max(1, triton.next_power_of_2(tiles_in)), isinstance(x, Scaled),
        gated, bias_N is not None, residual_MN is not None, behind is not None,
        "ieee" if values.dtype == torch.float32 else "tf32", cut.x_first, cut.ahead, held == BM,
        num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
        **(late(y, tiles * cut.split) if cut.late else {"LATE": False, **early(y, weight.nbytes <= EARLY_BYTES)}),
    )  # fmt: skip
    return y, behind


def fits(*weights: Tensor) -> bool:
    """Whether the accelerator can read these: rows of a multiple of 16 bytes, and 16-bit numbers, since float32 keeps
    the order in which cuBLAS adds."""
    return all(w.dtype in (torch.bfloat16, torch.float16) and w.shape[1] % 8 == 0 for w in weights)


def most_rows(*weights: Tensor) -> int:
    """How many rows products with all of these take at most."""
    small = all(w.shape[1] < 2048 and w.nbytes <= EARLY_BYTES for w in weights)
    return SMALL_ROWS if small else MAX_ROWS


@triton.jit
def _scaled(x, gain, scaled, squares, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start_early(EARLY)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + row * WIDTH + column, (value * g).to(scaled.dtype.element_ty), mask=inside)
    tl.store(squares + row, tl.sum(value * value, 0))


def scaled(x_MK: Tensor, norm: tuple[Tensor, float]) -> Scaled:
    """What a product that takes the norm of x needs, where none before it has made it."""
    M, K = x_MK.shape
    assert x_MK.is_contiguous()
    out = Scaled(tall((M, K), x_MK), torch.empty(1, M, dtype=torch.float32, device=x_MK.device), norm[1])
    block = triton.next_power_of_2(K)
    _scaled[(M,)](x_MK, norm[0], *out[:2], WIDTH=K, BLOCK=block, num_warps=8 if K > 2048 else 4, **early(x_MK))
    return out
