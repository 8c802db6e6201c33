"""Keys and values of every row in static slots. Which slot holds which position is a table of each row.

MLX arrays are values: a write makes a new array, which takes over the old one's memory only if nobody else holds it,
and what a kernel in flight reads is held. Each layer has an array of its own, so that a write copies a layer at most;
and an accepted path is committed by renumbering slots, which moves no key and no value: attention does not ask for
an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from redrafter.backends.mlx.ops import ascending, counting
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

    ``slot_of`` [rows, slots] int32: where position p of a row lies, p itself until ``keep_path`` renumbers;
    ``position_of``: its inverse.
    """

    def __init__(self, layers: int, heads: int, head_width: int, dtype: mx.Dtype) -> None:
        self.heads, self.head_width = heads, head_width
        self._dtype = dtype
        self.layers = [mx.zeros((0, 0, 2 * heads, head_width), dtype=dtype) for _ in range(layers)]
        self.slot_of = self.position_of = mx.zeros((0, 0), dtype=mx.int32)
        self._renumbered: set[int] = set()
        """rows whose positions may not be their slots"""
        self._spread = 0
        """a position's slot lies less than so many behind it"""
        self.nodes = 1
        """tokens per row that were placed last"""
        self.whole = False
        """The next forward is of one node of one row in order, and ``limit`` the slots that it sees: all of them."""
        self.limit: int | None = None
        """slots that attention looks at, where the caller knows it without asking the device"""
        self._rows = slice(0, 0)
        self._row_B1 = mx.zeros((0, 1), dtype=mx.int32)
        self._slot_BN = self._row_B1
        self._index: mx.array | None = None
        self._limit = 0

    @property
    def arrays(self) -> list[mx.array]:
        """All that a step changes."""
        return [*self.layers, self.slot_of, self.position_of]

    @arrays.setter
    def arrays(self, arrays: Sequence[mx.array]) -> None:
        *self.layers, self.slot_of, self.position_of = arrays

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
        whole = mx.broadcast_to(counting(slots), (rows, slots))
        for name in ("slot_of", "position_of"):
            table: mx.array = getattr(self, name)
            grown = mx.concatenate([table, whole[: table.shape[0], table.shape[1] :]], axis=1)
            setattr(self, name, mx.concatenate([grown, whole[table.shape[0] :]]))
        mx.eval(self.arrays)

    def expect(self, rows: int, nodes: int) -> None:
        """Trees of so many nodes are about to be committed to these rows."""
        if nodes > 1:
            self._renumbered.update(range(rows))
            self._spread = max(self._spread, nodes)

    def in_order(self, row: int) -> bool:
        """Whether the row's positions are its slots."""
        return row not in self._renumbered

    def limit_for(self, first_B: mx.array, tokens: int) -> int:
        """Slots that attention must look at when ``tokens`` tokens are written from slot ``first_B`` on."""
        if self.limit is not None:
            return self.limit
        longest: Any = first_B.max().item()
        return self.limit_of(longest, tokens)

    def limit_of(self, longest: int, tokens: int) -> int:
        """The same where the host knows the longest row."""
        return self.round_up(longest + max(tokens, self._spread))

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
        self.nodes = slot_BN.shape[1]
        self._index = None
        if rows == self.rows:  # a write along the axis of slots, then: one operation instead of five
            self._index = mx.broadcast_to(slot_BN[:, :, None, None], (*slot_BN.shape, 2 * self.heads, self.head_width))
        self._limit = limit

    def find(self, first_row: int, position_BN: mx.array) -> mx.array:
        """[B, N]: the slots of these positions."""
        rows = slice(first_row, first_row + position_BN.shape[0])
        return mx.take_along_axis(self.slot_of[rows], position_BN, axis=1)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store [B, N, H, d]; all keys and values to look at, [B, H, limit, d]."""
        return self.write(layer, mx.concatenate([keys, values], axis=2))

    def write(self, layer: int, both: mx.array) -> tuple[mx.array, mx.array]:
        """``update`` with the keys' heads, then the values': [B, N, 2 H, d]."""
        cache, new = self.layers[layer], both.astype(self._dtype)
        if self._index is None:
            cache[self._row_B1, self._slot_BN] = new
        else:
            cache = self.layers[layer] = mx.put_along_axis(cache, self._index, new, axis=1)
        keys, values = mx.split(cache[self._rows, : self._limit].transpose(0, 2, 1, 3), 2, axis=1)
        return keys, values

    def keep_path(self, lengths_B: mx.array, path_BD: mx.array) -> None:
        """Node ``path[b, d]`` of the tree last placed takes position ``lengths[b]`` + d; path repeats its last node.

        The nodes that were not accepted take the positions behind, whose next tokens will be written over them.
        """
        rows, depths = path_BD.shape
        node_N, row_B1 = counting(self.nodes), counting(rows)[:, None]
        place_BDN = mx.where(path_BD[:, :, None] == node_N, counting(depths)[:, None], self.nodes + node_N)
        order_BN = ascending(place_BDN.min(axis=1))
        position_BN = lengths_B[:, None] + node_N
        slot_BN = mx.take_along_axis(self.find(0, position_BN), order_BN, axis=1)
        self.slot_of[row_B1, position_BN] = slot_BN
        self.position_of[row_B1, slot_BN] = position_BN

    def settle(self, row: int, tokens: int) -> None:
        """Put the first ``tokens`` positions of a row into the slots of their numbers; what lies behind is lost."""
        if row not in self._renumbered:
            return
        if tokens:
            self._write(row, self._read(row, tokens), tokens)
        self._number(row)

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` positions of row ``to`` become those of row ``source``; what lies behind is lost."""
        self._write(to, self._read(source, tokens), tokens)
        self._number(to)

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` positions of two rows; what lies behind is lost."""
        first, second = self._read(a, tokens), self._read(b, tokens)
        self._write(a, second, tokens)
        self._write(b, first, tokens)
        self._number(a)
        self._number(b)

    def _read(self, row: int, tokens: int) -> list[mx.array]:
        """[tokens, 2 H, d] of every layer, in the order of positions."""
        slots = self.slot_of[row, :tokens]
        return [cache[row][slots] for cache in self.layers]

    def _write(self, row: int, stored: Sequence[mx.array], tokens: int) -> None:
        for cache, values in zip(self.layers, stored, strict=True):
            cache[row, :tokens] = values

    def _number(self, row: int) -> None:
        """Positions of the row are its slots again."""
        if row in self._renumbered:
            self.slot_of[row] = self.position_of[row] = counting(self.slots)
            self._renumbered.discard(row)
            self._spread = self._spread if self._renumbered else 0


def on_cuda() -> bool:
    """Whether an NVIDIA GPU computes."""
    return mx.cuda.is_available() and mx.default_device() == mx.gpu


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
