"""Products of a few rows on CUDA, by a kernel of our own that is launched like any other.

MLX captures every call of cuBLAS into a CUDA graph of its own: 23 us of the host for a product of 16 rows on an H200
where a lone row takes 7. A speculative step has 160 of them, and the host is what limits it. (Apple's GPUs have no such
cost and keep MLX's own products.)

    y = x W^T (+ added)        x [M, K], W [N, K], 2 <= M <= MAX_ROWS, 16-bit numbers, sums in float32

Tensor cores multiply 16 rows of W with 8 of x over 16 of K. Which 16 is free as long as both sides agree: so every
thread reads 16 bytes in a row, of W from memory and of x from the first cache, where the block's other warps find it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

MAX_ROWS = 64
WARPS, ROWS = 8, 32
"""Warps of a block, and rows of W that a warp multiplies."""
_CUDA = mx.cuda.is_available()
_NAMES = {mx.bfloat16: "bf16", mx.float16: "f16"}
_SOURCE = """
  // A warp: ROWS rows of W over one of SLICES parts of K. GROUPS * SLICES = 8 warps.
  constexpr int TILES = (M + 7) / 8, BLOCKS = K / 32, AHEAD = 3;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = warp / SLICES, slice = warp % SLICES, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * GROUPS + group) * 32;
  const uint4* weight[4];
  for (int i = 0; i < 4; i++) {
    const int row = min(first + 8 * i + g, N - 1);
    weight[i] = reinterpret_cast<const uint4*>(w + (long long)row * K) + t;
  }
  const uint4* token[TILES];
  for (int n = 0; n < TILES; n++) {
    token[n] = reinterpret_cast<const uint4*>(x + (long long)min(8 * n + g, M - 1) * K) + t;
  }
  float acc[2][TILES][4] = {};
  uint4 a[AHEAD][4];
  #pragma unroll
  for (int s = 0; s < AHEAD; s++) {
    const int block = slice + s * SLICES;
    if (block < BLOCKS) {
      #pragma unroll
      for (int i = 0; i < 4; i++) a[s][i] = read_once(weight[i] + 4 * block);
    }
  }
  for (int start = slice; start < BLOCKS; start += AHEAD * SLICES) {
    #pragma unroll
    for (int s = 0; s < AHEAD; s++) {
      const int block = start + s * SLICES;
      if (block >= BLOCKS) break;
      uint4 b[TILES];
      #pragma unroll
      for (int n = 0; n < TILES; n++) b[n] = __ldg(token[n] + 4 * block);
      #pragma unroll
      for (int n = 0; n < TILES; n++) {
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          multiply_TYPE(acc[h][n], a[s][2 * h].x, a[s][2 * h + 1].x, a[s][2 * h].y, a[s][2 * h + 1].y, b[n].x, b[n].y);
          multiply_TYPE(acc[h][n], a[s][2 * h].z, a[s][2 * h + 1].z, a[s][2 * h].w, a[s][2 * h + 1].w, b[n].z, b[n].w);
        }
      }
      const int next = block + AHEAD * SLICES;
      if (next < BLOCKS) {
        #pragma unroll
        for (int i = 0; i < 4; i++) a[s][i] = read_once(weight[i] + 4 * next);
      }
    }
  }
  // Slices are added in a fixed order: the upper half to the lower, until one is left.
  __shared__ float parts[4][2 * TILES * 4][32];
  for (int half = SLICES / 2; half > 0; half /= 2) {
    float (*mine)[32] = parts[group * (SLICES / 2) + slice % half];
    __syncthreads();
    if (slice >= half && slice < 2 * half) {
      #pragma unroll
      for (int i = 0; i < 2 * TILES * 4; i++) mine[i][lane] = (&acc[0][0][0])[i];
    }
    __syncthreads();
    if (slice < half) {
      #pragma unroll
      for (int i = 0; i < 2 * TILES * 4; i++) (&acc[0][0][0])[i] += mine[i][lane];
    }
  }
  if (slice > 0) return;
  #pragma unroll
  for (int n = 0; n < TILES; n++) {
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = first + 16 * (i / 4) + 8 * ((i % 4) / 2) + g, m = 8 * n + 2 * t + i % 2;
      if (row < N && m < M) {
        const long long place = (long long)m * N + row;
        float sum = acc[i / 4][n][i % 4];
        if (ADDED) sum += static_cast<float>(added[ADDED == 1 ? place : row]);
        y[place] = static_cast<T>(sum);
      }
    }
  }
"""
_HEADER = """
__device__ inline uint4 read_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ inline void multiply_TYPE(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""


def source(dtype: mx.Dtype) -> tuple[str, str]:
    """Header and body of the kernel."""
    return _HEADER.replace("TYPE", _NAMES[dtype]), _SOURCE.replace("TYPE", _NAMES[dtype])


@lru_cache(maxsize=2)
def _kernel(dtype: mx.Dtype) -> Any:
    header, body = source(dtype)
    return mx.fast.cuda_kernel(f"skinny_{_NAMES[dtype]}", ["x", "w", "added"], ["y"], body, header)


def product(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
    """x W^T (+ added): [.., K] and [N, K] -> [.., N]; ``added`` is broadcast."""
    rows = x.size // x.shape[-1]
    if _CUDA and _fits(rows, x.shape[-1], x.dtype, weight.dtype) and mx.default_device() == mx.gpu:
        return _skinny(x, weight, added, rows)
    return x @ weight.T if added is None else mx.addmm(added, x, weight.T)


def _fits(rows: int, inner: int, dtype: mx.Dtype, stored: mx.Dtype) -> bool:
    return 2 <= rows <= MAX_ROWS and inner % 32 == 0 and dtype in _NAMES and dtype == stored


def _skinny(x: mx.array, weight: mx.array, added: mx.array | None, rows: int) -> mx.array:
    out, inner = weight.shape
    # 0: nothing, 1: a row each, 2: one row for all
    kind = 0 if added is None else 2 if added.size == out else 1 if added.size == rows * out else 0
    groups = 1 if out <= 8192 else 2
    (y,) = _kernel(x.dtype)(
        inputs=[x, weight, x if added is None or not kind else added],
        template=[
            ("T", x.dtype), ("M", rows), ("N", out), ("K", inner), ("ADDED", kind),
            ("GROUPS", groups), ("SLICES", WARPS // groups),
        ],
        grid=(-(-out // (ROWS * groups)) * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(*x.shape[:-1], out)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return y if added is None or kind else y + added
