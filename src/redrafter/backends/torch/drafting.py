"""A drafter at work: bound to its target's embedding and head, with the text and the trunk's keys and values of every
row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.algorithm.lookup import UNKNOWN, Chain, find_chain
from redrafter.backends.torch.attention import masked_attention
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.ops import TorchOps
from redrafter.backends.torch.trunk import Attend
from redrafter.errors import InvalidRequest


class DraftState(NamedTuple):
    context: Tensor
    """[B, 1, C], C the drafter's width"""
    state: Tensor
    """[B, W, state]"""
    depth: int


class TorchDrafter:
    """What the beam search calls (``algorithm/beam.py``).

    embed: target ids -> [..., D]; head: exit hidden [..., X] -> logits over the draft vocabulary, or over its first
    ``vocabulary`` tokens (the ids are sorted by how often the target says them). ``table`` [V, 3 state or state]: what
    the cell adds of every token (``token_table``), which turns a product per drafted token into a look-up.
    """

    def __init__(
        self,
        drafter: Drafter,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        vocabulary: int = 0,
        table: Tensor | None = None,
    ) -> None:
        self.drafter = drafter
        self.table = table
        self._embed = embed
        self._head = head
        reduced = drafter.config.draft_vocabulary > 0
        self.token_ids = drafter.token_ids[: vocabulary or None] if reduced else None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._text = drafter.token_ids.new_zeros(0, 0)
        """[rows, slots]: tokens by position, what was read of every row"""

    def allocate(self, rows: int, capacity: int) -> None:
        """Room for ``rows`` texts of up to ``capacity`` tokens, and for the trunk's keys and values; grows, never
        shrinks."""
        config = self.drafter.config
        before = self._text
        self._text = before.new_full((rows, capacity + 65), UNKNOWN)  # one more: tokens stand behind their pairs
        self._text[: before.shape[0], : before.shape[1]] = before
        if not (config.trunk_layers and config.trunk_heads):
            return
        like = self._embed(torch.zeros(1, dtype=torch.int64, device=self.drafter.token_ids.device))
        # One step writes deepest + 1 pairs, of which those past the accepted ones are overwritten by the next.
        size = (rows, config.trunk_kv_heads, capacity + 64, config.width // config.trunk_heads)
        for caches in (self._keys, self._values):
            old, caches[:] = caches[:], [like.new_zeros(size) for _ in range(config.trunk_layers)]
            for before, after in zip(old, caches, strict=False):
                after[: before.shape[0], :, : before.shape[2]] = before

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` pairs of row ``to`` become those of row ``source``."""
        for kept in self._first_of(tokens):
            kept[to] = kept[source]

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` pairs of two rows."""
        for kept in self._first_of(tokens):
            of_a = kept[a].clone()
            kept[a] = kept[b]
            kept[b] = of_a

    def _first_of(self, tokens: int) -> list[Tensor]:
        """Of all rows, what the first ``tokens`` pairs left behind: keys, values, and tokens up to the last one's."""
        return [*(cache[:, :, :tokens] for cache in (*self._keys, *self._values)), self._text[:, : tokens + 1]]

    def read(self, reading: Reading, row: int = 0) -> Tensor:
        """The context [B, T, D] of every pair, whose keys and values are kept in rows ``row`` onward."""
        next_BTD = self._embed(reading.tokens)
        features = reading.features.to(next_BTD.dtype)
        first_B = self._first(reading)
        position_BT = first_B[:, None] + torch.arange(reading.tokens.shape[1], device=first_B.device)
        if len(self._text):
            self._text[row : row + len(first_B)].scatter_(1, position_BT + 1, reading.tokens)
        if not self._keys:
            assert not (self.drafter.config.trunk_layers and self.drafter.config.trunk_heads), "allocate() comes first"
            return self.drafter.context(features, next_BTD, position_BT)
        attend = self._attention(slice(row, row + position_BT.shape[0]), position_BT)
        return self.drafter.context(features, next_BTD, position_BT, attend)

    def read_at(self, reading: Reading, row_B: Tensor, kept_BT: Tensor) -> None:
        """Keep the keys and values of these pairs in rows that only the device knows; those of one text see each
        other. The other pairs are left out."""
        slots = self._text.shape[1] - 1
        position_BT = reading.first[:, None] + torch.arange(reading.tokens.shape[1], device=row_B.device)
        slot_BT = torch.where(kept_BT, position_BT, slots - 1)
        self._text[row_B[:, None], slot_BT + 1] = reading.tokens
        if not self._keys:
            return
        # Position -1 sees what position 0 sees: with nothing to see it would become NaN.
        mask = self.drafter.trunk.visible(position_BT.clamp(min=0), torch.arange(slots, device=row_B.device)[None])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in ((self._keys[layer], k), (self._values[layer], v)):
                cache[row_B[:, None], :, slot_BT] = new.transpose(1, 2)
            keys, values = (cache[layer].index_select(0, row_B) for cache in (self._keys, self._values))
            return masked_attention(q, keys, values, mask)

        next_BTD = self._embed(reading.tokens)
        self.drafter.context(reading.features.to(next_BTD.dtype), next_BTD, position_BT, attend)

    def _first(self, reading: Reading) -> Tensor:
        """[B]: the position of every row's pair 0; that of a text of one token is named -1."""
        return reading.first.clamp(min=0)

    def _attention(self, rows: slice, position_BT: Tensor) -> Attend:
        """Attention of new pairs at these positions over all that is kept of their rows, themselves included."""
        limit = self._limit(position_BT)
        slots = torch.arange(limit, device=position_BT.device)[None]
        mask = self.drafter.trunk.visible(position_BT, slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, new in ((self._keys[layer], k), (self._values[layer], v)):
                index = position_BT[:, None, :, None].expand(new.shape)
                cache[rows].scatter_(2, index, new)
            keys, values = (cache[layer][rows, :, :limit] for cache in (self._keys, self._values))
            return masked_attention(q, keys, values, mask)

        return attend

    def _limit(self, position_BT: Tensor) -> int:
        """How many slots attention must look at: on the CPU those in use, elsewhere all, so that shapes are static."""
        return int(position_BT.max()) + 1 if position_BT.device.type == "cpu" else self._keys[0].shape[2]

    def begin(self, reading: Reading) -> DraftState:
        context_BTD = self.read(reading)
        rows = torch.arange(context_BTD.shape[0], device=context_BTD.device)
        last_B = reading.count - 1
        context = context_BTD[rows, last_B][:, None]
        root_B1 = reading.tokens[rows, last_B][:, None]
        return DraftState(context, self._next(self.drafter.zeroth_state(context), root_B1, 0), 0)

    def recall(self, reading: Reading, length: int) -> Chain | None:
        if not len(self._text):
            return None
        text_BS, end_B = self._text[: len(reading.count)], self._first(reading) + reading.count
        if text_BS.device.type == "cpu":
            text_BS = text_BS[:, : int(end_B.max()) + 1]
        return find_chain(TorchOps(), text_BS, end_B, length)

    def extend(self, state: DraftState, beam_BW: Tensor, token_BW: Tensor) -> DraftState:
        index = beam_BW[:, :, None].expand(*beam_BW.shape, state.state.shape[-1])
        parent = torch.gather(state.state, 1, index)
        depth = state.depth + 1
        return DraftState(state.context, self._next(parent, token_BW, depth), depth)

    def _next(self, state: Tensor, token: Tensor, depth: int) -> Tensor:
        if self.table is None:
            return self.drafter.next_state(state, self._embed(token), depth)
        return self.drafter.take(state, self.table[token])

    def logits(self, state: DraftState) -> Tensor:
        return self._head(self.drafter.exit_hidden(state.context, state.state)).float()


def token_table(drafter: Drafter, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """[V, 3 state] (gru) or [V, state] (rnn): ``token_input`` of every token of the target, in the drafter's dtype."""
    if drafter.config.cell not in ("gru", "rnn"):
        raise InvalidRequest(f"a table of cell={drafter.config.cell!r} would save no product: leave it out")
    ids = torch.arange(drafter.config.vocab_size, device=drafter.token_ids.device)
    return torch.cat([drafter.token_input(embed(part)) for part in ids.split(4096)])
