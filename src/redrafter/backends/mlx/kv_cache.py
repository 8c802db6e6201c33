"""Keys and values of every row in static slots: token at position p of a row lies in slot p of that row.

MLX arrays are values: a write makes a new array, which takes over the old one's memory as long as nobody else holds
it. So each layer has an array of its own, and a slice that attention reads is never kept.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from redrafter.backends.mlx.ops import counting
from redrafter.errors import OutOfMemory

SLOT_STEP = 64
"""Attention looks at a multiple of so many slots, so that its shapes repeat."""
GPU_SLOT_STEP = 256
"""The same on a GPU, where a new shape costs more and a masked slot less."""


class KVCache:
    """One array per layer, [rows, slots, 2 H, d]: a token's H key heads, then its H value heads, lie side by side, so
    that a layer needs one write, by two indices.

    ``place`` says where the next forward's tokens go; every layer's ``update`` then writes there and returns the slots
    in use. Rows past the running ones and slots past ``limit`` are not looked at.
    """

    def __init__(self, layers: int, heads: int, head_width: int, dtype: mx.Dtype) -> None:
        self.heads, self.head_width = heads, head_width
        self._dtype = dtype
        self.layers = [mx.zeros((0, 0, 2 * heads, head_width), dtype=dtype) for _ in range(layers)]
        self.limit: int | None = None
        """slots that attention looks at, where the caller knows it without asking the device"""
        self._rows = slice(0, 0)
        self._row_B1 = mx.zeros((0, 1), dtype=mx.int64)
        self._slot_BN = self._row_B1
        self._limit = 0

    @property
    def rows(self) -> int:
        return self.layers[0].shape[0]

    @property
    def slots(self) -> int:
        return self.layers[0].shape[1]

    def bytes_for(self, rows: int, slots: int) -> int:
        return 2 * len(self.layers) * rows * self.heads * slots * self.head_width * self._dtype.size

    def reserve(self, rows: int, slots: int) -> None:
        """At least so many rows and slots, with what is stored kept. Raises OutOfMemory before anything is lost."""
        rows, slots = max(rows, self.rows), max(slots, self.slots)
        more_rows, more_slots = rows - self.rows, slots - self.slots
        if not more_rows and not more_slots:
            return
        need, free = self.bytes_for(rows, slots), free_bytes()
        if need > free:
            raise OutOfMemory(
                f"the key/value cache needs {need / 2**20:,.0f} MiB for {rows} rows of {slots} tokens, and "
                f"{free / 2**20:,.0f} MiB are free: lower max_context or max_batch"
            )
        self.layers = [mx.pad(x, [(0, more_rows), (0, more_slots), (0, 0), (0, 0)]) for x in self.layers]
        mx.eval(self.layers)

    def limit_for(self, first_B: mx.array, tokens: int) -> int:
        """Slots that attention must look at when ``tokens`` tokens are written from slot ``first_B`` on."""
        if self.limit is not None:
            return self.limit
        longest: Any = first_B.max().item()
        return self.round_up(longest + tokens)

    def round_up(self, slots: int) -> int:
        step = GPU_SLOT_STEP if mx.default_device() == mx.gpu else SLOT_STEP
        return min(self.slots, -(-slots // step) * step)

    def place(self, first_row: int, slot_BN: mx.array, limit: int) -> None:
        """The next forward is of B rows from ``first_row``; token i of row b goes to ``slot_BN[b, i]``; attention
        looks at the first ``limit`` slots."""
        rows = slot_BN.shape[0]
        self._rows = slice(first_row, first_row + rows)
        self._row_B1 = counting(first_row + rows)[first_row:, None]
        self._slot_BN = slot_BN
        self._limit = limit

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store [B, N, H, d]; all keys and values to look at, [B, H, limit, d]."""
        return self.write(layer, mx.concatenate([keys, values], axis=2))

    def write(self, layer: int, both: mx.array) -> tuple[mx.array, mx.array]:
        """``update`` with the keys' heads, then the values': [B, N, 2 H, d]."""
        cache = self.layers[layer]
        cache[self._row_B1, self._slot_BN] = both.astype(self._dtype)
        seen = cache[self._rows, : self._limit].transpose(0, 2, 1, 3)
        return seen[:, : self.heads], seen[:, self.heads :]

    def move_slots(self, source_BD: mx.array, to_BD: mx.array) -> None:
        """Slot ``to[b, d]`` becomes what slot ``source[b, d]`` was, in every layer; reads all before it writes any."""
        row_B1 = counting(source_BD.shape[0])[:, None]
        for cache in self.layers:
            cache[row_B1, to_BD] = cache[row_B1, source_BD]

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` slots of row ``to`` become those of row ``source``."""
        for cache in self.layers:
            cache[to, :tokens] = cache[source, :tokens]

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` slots of two rows."""
        for cache in self.layers:
            pair = mx.stack([cache[b, :tokens], cache[a, :tokens]])
            cache[a, :tokens], cache[b, :tokens] = pair[0], pair[1]


def free_bytes() -> int:
    """Memory that can still be allocated: on a GPU what its driver recommends, on a CPU what the system has free;
    where neither says, more than anyone has."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        total = int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 2**60)
        return total - mx.get_active_memory()
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**60
