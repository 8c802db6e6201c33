"""Rows that hold what ended requests left, and prompts that begin like a text in the cache.

With its first r tokens equal to another text's, a prompt can take r slots from that text's row: keys and values of
tokens 0..r-1 in the target's cache, and pairs 0..r-1 in the drafter's trunk, the last of which was made with token r.
So r is less than the common length, and at most the prompt without its last two tokens: the last is the root, and
the features of the one before it open the drafter's first reading.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from redrafter.backends.protocol import Backend, HeldRow
from redrafter.requests import Request

WORTH_WAITING = 64
"""Tokens: so long a beginning takes longer to read twice than to copy."""


class Prefixes:
    """Where the engine's requests find a row, and what they leave there (``Backend.held``)."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def claim(self, row: int, request: Request, running: Sequence[Request] | None, max_batch: int) -> int:
        """Empty row ``row``, the first that no request runs in, and fill it with what the prompt shares with a
        running or ended request: how many tokens that is. ``running`` None: nothing is shared."""
        held = self.backend.held
        source, tokens = None, 0
        if running is not None:
            texts = {i: _running_row(r) for i, r in enumerate(running)} | held
            shared = {i: self._shared(request, text) for i, text in texts.items()}
            tokens = max(shared.values(), default=0)
            if tokens:
                source = max(shared, key=lambda i: (shared[i], i in held, i == row))
            source = self._make_room(row, source, tokens, min(max_batch, self.backend.rows))
        held.pop(row, None)
        if source is not None and source != row:
            self.backend.copy_prefix(source, row, tokens)
        return tokens

    def _make_room(self, row: int, source: int | None, tokens: int, rows: int) -> int | None:
        """Decide which ended text is given up for row ``row``, and save the one that lies there if it is another: the
        text left longest ago or, if less is lost, what ``source`` has beyond the prompt. Returns where the source is
        now."""
        held = self.backend.held
        others = [i for i in range(row, rows) if i != source]
        oldest = min(others, key=lambda i: held[i].ended if i in held else 0.0, default=row)
        lost = held[oldest].tokens if oldest in held else 0
        if source in held and (not others or held[source].tokens - tokens <= lost):
            self._exchange_held(row, source)
            return row
        if oldest != row and row in held:
            self.backend.copy_prefix(row, oldest, held[row].tokens)
            held[oldest] = held[row]
        return source

    def _exchange_held(self, a: int, b: int) -> None:
        """Row ``b``, which holds a text, and row ``a``, which may, change places."""
        if a == b:
            return
        held = self.backend.held
        if a in held:
            self.backend.swap_rows(a, b, max(held[a].tokens, held[b].tokens))
            held[a], held[b] = held[b], held[a]
        else:
            self.backend.copy_prefix(b, a, held[b].tokens)
            held[a] = held.pop(b)

    def _shared(self, request: Request, text: HeldRow) -> int:
        if text.salt != request.salt:
            return 0
        most = min(text.tokens, len(request.prompt_ids) - 2)
        if self.backend.drafter is not None:
            most = min(most, text.pairs)
        return max(0, min(most, _common(request.prompt_ids, text.ids) - 1))

    @staticmethod
    def waits(request: Request, others: Sequence[Request]) -> bool:
        """Whether the prompt had better be read after one of these, since much of it is the same."""
        same = (other.prompt_ids for other in others if other.salt == request.salt)
        return any(_common(request.prompt_ids, ids) > WORTH_WAITING for ids in same)

    def relocate(self, source: int, to: int, tokens: int) -> None:
        """A prompt that was read into row ``source`` takes its place among the running."""
        if source == to:
            return
        held = self.backend.held
        if to in held:
            self.exchange(source, to, max(tokens, held[to].tokens), keep=True)
            held[source] = held.pop(to)
        else:
            self.backend.copy_prefix(source, to, tokens)

    def exchange(self, row: int, last: int, tokens: int, *, keep: bool) -> None:
        """Row ``row`` becomes what row ``last`` was and, with ``keep``, the other way round."""
        if keep:
            self.backend.swap_rows(row, last, tokens)
        else:
            self.backend.copy_prefix(last, row, tokens)

    def park(self, row: int, request: Request) -> None:
        """Remember what an ended request left in its row."""
        left = _running_row(request)
        if left.tokens:
            self.backend.held[row] = left


def _running_row(request: Request) -> HeldRow:
    ids = (*request.prompt_ids, *request.answer_ids)
    return HeldRow(ids, min(request.cached, len(ids)), request.pairs, request.salt, time.perf_counter())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
