"""A drafter at work: bound to its target's embedding and head, with the trunk's keys and values of every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from redrafter.algorithm.beam import Reading
from redrafter.backends.mlx.attention import additive, offsets
from redrafter.backends.mlx.drafter import Drafter
from redrafter.backends.mlx.kv_cache import SLOT_STEP, KVCache
from redrafter.backends.mlx.ops import counting

TABLE_PART = 4096
"""Tokens whose rows of a table are computed at once."""


class DraftState(NamedTuple):
    context: mx.array
    """[B, 1, ..]: ``Drafter.exit_context``"""
    state: mx.array
    """[B, W, state]"""
    depth: int


class MLXDrafter:
    """What the beam search calls (``algorithm/beam.py``).

    embed: target ids -> [..., D]; head: exit hidden [..., X] -> logits over the draft vocabulary, whose target ids are
    ``token_ids`` [V_d] (None: the target's own vocabulary); table [V, 3 state or state]: what the cell adds of every
    token (``token_table``), which turns the products of a drafted token's embedding into a look-up.
    """

    def __init__(
        self,
        drafter: Drafter,
        embed: Callable[[mx.array], mx.array],
        head: Callable[[mx.array], mx.array],
        token_ids: mx.array | None,
        table: mx.array | None = None,
    ) -> None:
        drafter.join()
        self.drafter = drafter
        self._table = table
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
            # One step writes deepest + 1 pairs, of which those past the accepted ones are written again.
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
        cache, config = self.cache, self.drafter.config
        if cache is None:
            return self.drafter.context(features, next_BTD, None, None, None)
        limit = cache.limit_for(first_B, pairs)
        cache.place(row, position_BT, limit)
        visible = self.drafter.trunk.visible(position_BT, counting(limit)[None])
        mask = additive(visible, next_BTD.dtype)

        offset = offsets(position_BT, config.trunk_heads + config.trunk_kv_heads, config.trunk_kv_heads)
        return self.drafter.context(features, next_BTD, offset, mask, cache.write)

    def begin(self, reading: Reading) -> DraftState:
        context_BTD = self.read(reading)
        row_B, last_B = counting(context_BTD.shape[0]), reading.count - 1
        context = context_BTD[row_B, last_B][:, None]
        root_B1 = reading.tokens[row_B, last_B][:, None]
        state = self._next(self.drafter.zeroth_state(context), root_B1, 0)
        return DraftState(self.drafter.exit_context(context), state, 0)

    def recall(self, reading: Reading, length: int) -> None:
        """Texts are not kept here: nothing is looked up."""

    def extend(self, state: DraftState, beam_BW: mx.array, token_BW: mx.array) -> DraftState:
        parent = mx.take_along_axis(state.state, beam_BW[:, :, None], axis=1)
        depth = state.depth + 1
        return DraftState(state.context, self._next(parent, token_BW, depth), depth)

    def _next(self, state: mx.array, token: mx.array, depth: int) -> mx.array:
        if self._table is None:
            return self.drafter.next_state(state, self._embed(token), depth)
        return self.drafter.take(state, self._table[token])

    def logits(self, state: DraftState) -> mx.array:
        return self._head(self.drafter.exit_hidden(state.context, state.state)).astype(mx.float32)


def token_table(drafter: Drafter, embed: Callable[[mx.array], mx.array]) -> mx.array:
    """[V, 3 state] (gru) or [V, state] (rnn): ``token_input`` of every token of the target, in the drafter's dtype."""
    parts = []
    for start in range(0, drafter.config.vocab_size, TABLE_PART):
        ids = mx.arange(start, min(start + TABLE_PART, drafter.config.vocab_size))
        parts.append(drafter.token_input(embed(ids)))
        mx.eval(parts)
    table = mx.concatenate(parts)
    mx.eval(table)
    return table
