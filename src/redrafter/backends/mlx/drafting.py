"""A drafter at work: bound to its target's embedding and head, with the trunk's keys and values of every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from redrafter.algorithm.beam import Reading
from redrafter.backends.mlx.attention import additive
from redrafter.backends.mlx.drafter import Drafter
from redrafter.backends.mlx.kv_cache import SLOT_STEP, KVCache
from redrafter.backends.mlx.ops import counting


class DraftState(NamedTuple):
    context: mx.array
    """[B, 1, C], C the drafter's width"""
    state: mx.array
    """[B, W, state]"""
    depth: int


class MLXDrafter:
    """What the beam search calls (``algorithm/beam.py``).

    embed: target ids -> [..., D]; head: exit hidden [..., X] -> logits over the draft vocabulary, whose target ids are
    ``token_ids`` [V_d] (None: the target's own vocabulary).
    """

    def __init__(
        self,
        drafter: Drafter,
        embed: Callable[[mx.array], mx.array],
        head: Callable[[mx.array], mx.array],
        token_ids: mx.array | None,
    ) -> None:
        self.drafter = drafter
        self.token_ids = token_ids
        self._embed = embed
        self._head = head
        config = drafter.config
        self.cache: KVCache | None = None
        """of the trunk's attention, if it has any"""
        if config.trunk_layers and config.trunk_heads:
            dtype = drafter.fuse.weight.dtype
            width = config.width // config.trunk_heads
            self.cache = KVCache(config.trunk_layers, config.trunk_kv_heads, width, dtype)

    def allocate(self, rows: int, capacity: int) -> None:
        """Room for the trunk's keys and values of ``rows`` texts of up to ``capacity`` tokens; grows, never shrinks."""
        if self.cache is not None:
            # One step writes draft_length + 1 pairs, of which those past the accepted ones are written again.
            self.cache.reserve(rows, capacity + SLOT_STEP)

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` pairs of row ``to`` become those of row ``source``."""
        if self.cache is not None:
            self.cache.copy_prefix(source, to, tokens)

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` pairs of two rows."""
        if self.cache is not None:
            self.cache.swap_rows(a, b, tokens)

    def read(self, reading: Reading, row: int = 0) -> mx.array:
        """The context [B, T, D] of every pair, whose keys and values are kept in rows ``row`` onward."""
        next_BTD = self._embed(reading.tokens)
        features = reading.features.astype(next_BTD.dtype)
        pairs = reading.tokens.shape[1]
        first_B = mx.maximum(reading.first, 0)
        position_BT = first_B[:, None] + counting(pairs)
        cache = self.cache
        if cache is None:
            return self.drafter.context(features, next_BTD, position_BT, None, _no_store)
        limit = cache.limit_for(first_B, pairs)
        cache.place(row, position_BT, limit)
        visible = self.drafter.trunk.visible(position_BT, counting(limit)[None])
        mask = additive(visible, next_BTD.dtype)

        def store(layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            return cache.update(layer, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))

        return self.drafter.context(features, next_BTD, position_BT, mask, store)

    def begin(self, reading: Reading) -> DraftState:
        context_BTD = self.read(reading)
        row_B, last_B = counting(context_BTD.shape[0]), reading.count - 1
        context = context_BTD[row_B, last_B][:, None]
        root = self._embed(reading.tokens[row_B, last_B])[:, None]
        return DraftState(context, self.drafter.first_state(context, root), 0)

    def extend(self, state: DraftState, beam_BW: mx.array, token_BW: mx.array) -> DraftState:
        parent = mx.take_along_axis(state.state, beam_BW[:, :, None], axis=1)
        depth = state.depth + 1
        return DraftState(state.context, self.drafter.next_state(parent, self._embed(token_BW), depth), depth)

    def logits(self, state: DraftState) -> mx.array:
        return self._head(self.drafter.exit_hidden(state.context, state.state)).astype(mx.float32)


def _no_store(layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """A trunk without attention keeps nothing."""
    return keys, values
