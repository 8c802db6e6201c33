"""Writing to the key/value cache: one launch for a layer's new keys and values, one for the slots a step keeps.

The eager twins are ``KVCache.update`` and ``KVCache.keep_path``.

Letters: L layers, B rows, H KV heads, N tokens, S slots, d head width, D depths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from redrafter.backends.torch.kernels.early import early, start_early
from redrafter.backends.torch.kv_cache import KVCache


@triton.jit
def _write(
    new_keys, new_values, slots, keys, values, tokens,
    k_row, k_head, k_token, v_row, v_head, v_token, slot_row, cache_row, cache_head, cache_slot,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HEADS_P: tl.constexpr, WIDTH_P: tl.constexpr,
):  # fmt: skip
    """A program writes one token's keys and values of HEADS_P heads."""
    token = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * HEADS_P + tl.arange(0, HEADS_P)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH_P)[None, :]
    inside = (head < HEADS) & (column < WIDTH)
    slot = tl.load(slots + row * slot_row + token)
    to = row * cache_row + head * cache_head + slot * cache_slot + column
    k = tl.load(new_keys + row * k_row + head * k_head + token.to(tl.int64) * k_token + column, mask=inside, other=0.0)
    v = tl.load(
        new_values + row * v_row + head * v_head + token.to(tl.int64) * v_token + column, mask=inside, other=0.0
    )
    tl.store(keys + to, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + to, v.to(values.dtype.element_ty), mask=inside)


def write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slot_BN: Tensor) -> None:
    """Token n of row b goes to slot ``slot_BN[b, n]`` (int64, dense rows) of ``keys`` and ``values`` [B, H, S, d].

    These two share their strides. ``new_keys``, ``new_values`` [B, H, N, d]; the last axis of all is dense.
    """
    rows, heads, tokens, width = new_keys.shape
    assert keys.stride() == values.stride() and slot_BN.stride(1) == 1
    assert keys.stride(3) == new_keys.stride(3) == new_values.stride(3) == 1
    width_padded = triton.next_power_of_2(width)
    together = min(triton.next_power_of_2(heads), max(1, 1024 // width_padded))
    _write[(tokens, rows, triton.cdiv(heads, together))](
        new_keys, new_values, slot_BN, keys, values, tokens,
        *new_keys.stride()[:3], *new_values.stride()[:3], slot_BN.stride(0), *keys.stride()[:3],
        HEADS=heads, WIDTH=width, HEADS_P=together, WIDTH_P=width_padded, num_warps=4,
    )  # fmt: skip


@triton.jit
def _keep_path(
    keys, values, lengths, path, rows, length_row, path_row, layer_stride, row_stride, head_stride, slot_stride,
    DEPTHS: tl.constexpr, WIDTH: tl.constexpr, DEPTHS_P: tl.constexpr, WIDTH_P: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one row and layer: it reads all of the path before it writes any of it."""
    start_early(EARLY)
    row = (tl.program_id(0) % rows).to(tl.int64)
    layer = (tl.program_id(0) // rows).to(tl.int64)
    depth = tl.arange(0, DEPTHS_P)
    column = tl.arange(0, WIDTH_P)[None, :]
    first = tl.load(lengths + row * length_row)
    node = tl.load(path + row * path_row + depth, mask=depth < DEPTHS, other=0)
    # An idle row's path leads anywhere, also behind the cache.
    moves = ((depth < DEPTHS) & (node != depth) & (first >= 0))[:, None] & (column < WIDTH)
    start = layer * layer_stride + row * row_stride + tl.program_id(1).to(tl.int64) * head_stride
    source = start + (first + node)[:, None] * slot_stride + column
    to = start + (first + depth)[:, None] * slot_stride + column
    k = tl.load(keys + source, mask=moves, other=0.0)
    v = tl.load(values + source, mask=moves, other=0.0)
    tl.debug_barrier()
    tl.store(keys + to, k, mask=moves)
    tl.store(values + to, v, mask=moves)


def keep_path(keys: Tensor, values: Tensor, lengths_B: Tensor, path_BD: Tensor) -> None:
    """Slot ``lengths_B`` + d becomes what slot ``lengths_B`` + ``path_BD[:, d]`` was, in every layer; nothing does in a
    row of negative length.

    ``keys``, ``values`` [L, B or more, H, S, d], which share their strides; the last axis is dense.
    """
    layers, _, heads, _, width = keys.shape
    rows, depths = path_BD.shape
    assert keys.stride() == values.stride() and keys.stride(4) == 1 and path_BD.stride(1) == 1
    _keep_path[(layers * rows, heads)](
        keys, values, lengths_B, path_BD, rows, lengths_B.stride(0), path_BD.stride(0), *keys.stride()[:4],
        DEPTHS=depths, WIDTH=width, DEPTHS_P=triton.next_power_of_2(depths), WIDTH_P=triton.next_power_of_2(width),
        num_warps=4, **early(keys),
    )  # fmt: skip


class LayerSlots(NamedTuple):
    """Where a layer's tokens go, and what it attends to."""

    keys: Tensor  # [B, H, S, d]
    values: Tensor  # the same, with the same strides
    slots: Tensor  # [B, N] int64


class KernelCache(KVCache):
    """KVCache whose writes are one launch each."""

    def layer(self, layer_idx: int) -> LayerSlots:
        """The rows, slots and limit that ``place`` named."""
        keys, values = (x[layer_idx, self._rows, :, : self._limit] for x in (self.keys, self.values))
        return LayerSlots(keys, values, self._slot_BN)

    def first_slots(self, lengths_B: Tensor, tokens: int) -> Tensor:
        """A row of negative length is idle (``graph.IDLE``): it writes to the last slots, behind all texts."""
        return torch.where(lengths_B < 0, self.slots - tokens, lengths_B)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.check(keys, values, layer_idx)
        stored_keys, stored_values, slot_BN = self.layer(layer_idx)
        write(stored_keys, stored_values, keys, values, slot_BN)
        return stored_keys, stored_values

    def keep_path(self, lengths_B: Tensor, path_BD: Tensor) -> None:
        if path_BD.shape[1] > 1:
            keep_path(self.keys, self.values, lengths_B, path_BD)
