"""Keys and values of every row in static slots: token at position p of a row lies in slot p of that row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redrafter.errors import OutOfMemory, UnsupportedModel


class KVCache:
    """What transformers' attention layers write to and read from, shape [layers, rows, heads, slots, head width].

    ``place`` says where the next forward's tokens go; every layer's ``update`` then writes there and returns the slots
    in use. Rows past the running ones and slots past the longest row are not looked at.
    """

    is_compileable = False

    def __init__(self, layers: int, heads: int, head_width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.head_width = heads, head_width
        self._layers, self._dtype, self._device = layers, dtype, device
        self.keys = torch.zeros(layers, 0, heads, 0, head_width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self._rows = slice(0, 0)
        self._slot_BN = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._limit = 0

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def bytes_for(self, rows: int, slots: int) -> int:
        return 2 * self._layers * rows * self.heads * slots * self.head_width * self._dtype.itemsize

    def reserve(self, rows: int, slots: int) -> None:
        """At least so many rows and slots, with what is stored kept. Raises OutOfMemory before anything is lost."""
        rows, slots = max(rows, self.rows), max(slots, self.slots)
        if (rows, slots) == (self.rows, self.slots):
            return
        need, free = self.bytes_for(rows, slots), free_bytes(self._device)
        if need > free:
            raise OutOfMemory(
                f"the key/value cache needs {need / 2**20:,.0f} MiB for {rows} rows of {slots} tokens, and "
                f"{free / 2**20:,.0f} MiB are free: lower max_context or max_batch"
            )
        size = (self._layers, rows, self.heads, slots, self.head_width)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = torch.zeros(size, dtype=self._dtype, device=self._device)
            new[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, new)

    def place(self, first_row: int, slot_BN: Tensor, limit: int) -> None:
        """The next forward is of B rows from ``first_row``; token i of row b goes to ``slot_BN[b, i]``; attention
        looks at the first ``limit`` slots."""
        self._rows = slice(first_row, first_row + slot_BN.shape[0])
        self._slot_BN = slot_BN
        self._limit = limit

    def moved(self, row_B: Tensor, slot_BN: Tensor) -> Tensor:
        """Slots of rows that only the device knows, counted from those of rows 0, 1, 2, .. for the kernels to write."""
        away_B = row_B - torch.arange(len(row_B), device=row_B.device)
        return away_B[:, None] * (self.heads * self.slots) + slot_BN

    def first_slots(self, lengths_B: Tensor, tokens: int) -> Tensor:
        """[B]: where the next ``tokens`` tokens of every row begin."""
        return lengths_B

    def check(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        if keys.shape[1:] != values.shape[1:] or (keys.shape[1], keys.shape[3]) != (self.heads, self.head_width):
            raise UnsupportedModel(
                f"layer {layer_idx} has keys {list(keys.shape[1:])} and values {list(values.shape[1:])} [heads, "
                f"tokens, width]; the cache needs {self.heads} heads of width {self.head_width} in every layer"
            )

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers calls this in every layer with [B, H, N, d]; returns [B, H, limit, d]."""
        self.check(keys, values, layer_idx)
        index = self._slot_BN[:, None, :, None].expand(keys.shape)
        stored = self.keys[layer_idx, self._rows], self.values[layer_idx, self._rows]
        for cache, new in zip(stored, (keys, values), strict=True):
            cache.scatter_(2, index, new.to(self._dtype))
        return stored[0][:, :, : self._limit], stored[1][:, :, : self._limit]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks for it where position_ids are not given; ours always are."""
        return self._limit

    def keep_path(self, lengths_B: Tensor, path_BD: Tensor) -> None:
        """Slot ``lengths[b]`` + d becomes what slot ``lengths[b]`` + ``path[b, d]`` was, in every layer; reads all
        before it writes any."""
        rows, depths = path_BD.shape
        if depths == 1:  # the root already lies where it belongs
            return
        source_BD = lengths_B[:, None] + path_BD
        to_BD = lengths_B[:, None] + torch.arange(depths, device=self._device)
        for cache in (self.keys[:, :rows], self.values[:, :rows]):
            shape = (self._layers, rows, self.heads, depths, self.head_width)
            moved = cache.gather(3, source_BD[None, :, None, :, None].expand(shape))
            cache.scatter_(3, to_BD[None, :, None, :, None].expand(shape), moved)

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` slots of row ``to`` become those of row ``source``."""
        for cache in (self.keys, self.values):
            cache[:, to, :, :tokens] = cache[:, source, :, :tokens]

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` slots of two rows."""
        for cache in (self.keys, self.values):
            kept = cache[:, a, :, :tokens].clone()
            cache[:, a, :, :tokens] = cache[:, b, :, :tokens]
            cache[:, b, :, :tokens] = kept


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated; where the system does not say, more than anyone has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**60
