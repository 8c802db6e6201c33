"""The context that a step drafts from, in a few launches. The eager twin is ``TorchDrafter.read`` of the last pair.

All pairs' keys and values are kept, so the trunk's one layer reads all of them up to its attention; what comes after
that is asked of the last pair alone.

Letters: B rows, T pairs, M = B x T, D the target's hidden size, C the drafter's width, H heads, S slots, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from redrafter.algorithm.beam import Reading
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kernels.matmul import MAX_ROWS, Norm, Workspace, few_rows
from redrafter.backends.torch.kernels.norms import add_rms_norm
from redrafter.backends.torch.kernels.rotate import interleaved
from redrafter.backends.torch.kernels.stream import MAX_ROWS as STREAM_ROWS
from redrafter.backends.torch.kernels.stream import fits, stream
from redrafter.backends.torch.kernels.tall import tall
from redrafter.backends.torch.kernels.window import MAX_PAIRS, Rotation, window_attention
from redrafter.backends.torch.trunk import rotary

EPS = 1e-6
"""Of ``trunk.rms``."""


@triton.jit
def _scaled_parts(
    features, tokens, embedding, out, f_row, f_pair, t_row, t_pair, eps,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program scales one layer's features of one pair, or the next token's embedding."""
    start_early(EARLY)
    m = tl.program_id(0)
    part = tl.program_id(1)
    row = (m // PAIRS).to(tl.int64)
    pair = m % PAIRS
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype = out.dtype.element_ty
    if part < PARTS - 1:
        source = features + row * f_row + pair * f_pair + part * WIDTH
        x = tl.load(source + column, mask=inside, other=0.0).to(dtype).to(tl.float32)
    else:
        token = tl.load(tokens + row * t_row + pair * t_pair).to(tl.int64)
        x = tl.load(embedding + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    place = (m.to(tl.int64) * PARTS + part) * WIDTH
    tl.store(out + place + column, (x * scale).to(dtype), mask=inside)


def scaled_parts(features_BTF: Tensor, token_BT: Tensor, embedding_VD: Tensor) -> Tensor:
    """[M, F + D]: what ``Drafter.context`` gives to ``fuse``: every D features, and the token's embedding, as ``rms``
    scales them."""
    rows, pairs, size = features_BTF.shape
    width = embedding_VD.shape[1]
    assert size % width == 0 and features_BTF.stride(2) == 1 and embedding_VD.is_contiguous()
    out = tall((rows * pairs, size + width), embedding_VD)
    parts = size // width + 1
    _scaled_parts[(rows * pairs, parts)](
        features_BTF, token_BT, embedding_VD, out, *features_BTF.stride()[:2], *token_BT.stride(), EPS,
        PAIRS=pairs, PARTS=parts, WIDTH=width, BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 2048 else 4, **early(out),
    )  # fmt: skip
    return out


def _joined(*linears: Any) -> Tensor:
    """Their weights under one another; the modules keep their part of it, so that none is held twice."""
    sizes = [linear.weight.shape[0] for linear in linears]
    whole = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, whole.split(sizes), strict=True):
        linear.weight = torch.nn.Parameter(part, requires_grad=False)
    return whole


def _in_turn(gate: Any, up: Any) -> Tensor:
    """The same with one row of each in turn."""
    weights = torch.cat([linear.weight.detach() for linear in (gate, up)])
    whole = interleaved(weights, len(weights))
    for linear, part in zip((gate, up), (whole[0::2], whole[1::2]), strict=True):
        linear.weight = torch.nn.Parameter(part, requires_grad=False)
    return whole


class LastContext:
    """``Drafter.context`` of every row's last pair, for a drafter with one trunk layer that attends."""

    def __init__(self, drafter: Drafter, embedding_VD: Tensor) -> None:
        config, layer = drafter.config, drafter.trunk.layers[0]
        self._drafter: Any = drafter
        self._layer: Any = layer
        self._embedding = embedding_VD
        self._qkv = _joined(layer.q_proj, layer.k_proj, layer.v_proj)
        self._gate_up = _in_turn(layer.gate_proj, layer.up_proj)
        self._heads, self._kv_heads = config.trunk_heads, config.trunk_kv_heads
        self._width = config.width // config.trunk_heads
        self._ones = torch.ones(config.width, dtype=self._qkv.dtype, device=self._qkv.device)
        self._rotation: Rotation | None = None
        self._workspace = Workspace(self._qkv.device, floats=1 << 19, counters=256)
        self._streams = fits(drafter.fuse.weight)

    @staticmethod
    def exists(drafter: Drafter) -> bool:
        return drafter.config.trunk_layers == 1 and drafter.config.trunk_heads > 0

    @staticmethod
    def covers(reading: Reading) -> bool:
        rows, pairs = reading.tokens.shape
        return rows <= MAX_ROWS and pairs <= MAX_PAIRS

    def allocate(self, slots: int) -> None:
        """The angles of all positions."""
        position_1S = torch.arange(slots, device=self._qkv.device)[None]
        self._rotation = Rotation(*(x[0, 0].contiguous() for x in rotary(position_1S, self._width, self._qkv.dtype)))

    def __call__(self, reading: Reading, keys: Tensor, values: Tensor) -> Tensor:
        """[B, C]. Pairs past the count repeat the last one, so the last pair is also the one at T - 1."""
        assert self._rotation is not None, "allocate() comes first"
        rows, pairs = reading.tokens.shape
        x_MC = self._fused(scaled_parts(reading.features, reading.tokens, self._embedding))
        if rows * pairs <= MAX_ROWS:
            qkv = few_rows(x_MC, self._qkv, norm=Norm(None, EPS))
        else:
            qkv = F.linear(add_rms_norm(x_MC, None, self._ones, EPS)[1], self._qkv)
        heads = qkv.view(rows, pairs, -1, self._width).transpose(1, 2)
        q, k, v = heads.split([self._heads, self._kv_heads, self._kv_heads], 1)
        count_B = reading.count.contiguous()
        window = self._drafter.trunk.window
        y = window_attention((q, k, v), (keys, values), reading.first.contiguous(), window, self._rotation, count_B)
        x = x_MC.view(rows, pairs, -1)[:, -1]
        x = few_rows(y.view(rows, -1), self._layer.o_proj.weight, residual_MN=x)
        inner = few_rows(x, self._gate_up, norm=Norm(None, EPS), gated=True)
        x = few_rows(inner, self._layer.down_proj.weight, residual_MN=x)
        return add_rms_norm(x, None, self._ones, EPS)[1]

    def _fused(self, x_MK: Tensor) -> Tensor:
        if self._streams and 1 < len(x_MK) <= STREAM_ROWS:
            return stream(x_MK, self._drafter.fuse.weight, workspace=self._workspace)[0]
        out: Tensor = self._drafter.fuse(x_MK)
        return out
