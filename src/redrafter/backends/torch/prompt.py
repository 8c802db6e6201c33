"""Reading prompts with a CUDA graph: launched one by one, a layer's kernels cost more time than they take.

One short text is padded to one of a few lengths. Several texts are read at once, in segments that each know their row
and place. So is a long text, in longer segments, since each of them reads all keys before it; they see each other,
because a layer stores all keys before it attends. What pads leave in the caches lies behind the text and is overwritten
before anything looks there. Its slow twin is ``BaseBackend.prefill_chunk``.

Letters: S segments, T tokens of each, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.backends.protocol import PromptPart
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.gpu import room_for
from redrafter.backends.torch.graph import Record
from redrafter.backends.torch.target import TorchTarget

LENGTHS = (16, 32, 64, 128)
"""A graph for each; at most as many tokens as the attention kernel takes nodes."""
LONG = (2, 4)
"""Segments of as many tokens as the longest of these, for a longer text."""
SEGMENT = 32
MANY = (4, 8, 16)
"""Segments of several texts. The 7B shape on one H200 reads 128 tokens in 5.4 ms, which its weights alone would take
3; so a batch's prompts one after the other cost a seventh of its answers."""
MOST = SEGMENT * MANY[-1]


class _Buffers(NamedTuple):
    numbers: Tensor  # [S, 5 + T] int64: row, position, slot, count, opens; tokens
    before: Tensor  # [S, F] features of the token before


class _Segment(NamedTuple):
    row: int
    start: int
    tokens: Sequence[int]
    opens: int


GOES_ON, AFTER, FIRST = range(3)
"""How a segment opens: where the one before it ends; after a token whose features are given; after none, or one whose
pair the drafter has."""


class PromptReader:
    def __init__(self, target: TorchTarget, drafter: TorchDrafter | None, record: Record) -> None:
        self._target, self._drafter, self._record = target, drafter, record
        self._graphs: dict[tuple[int, int], tuple[_Buffers, Callable[[], None], Tensor]] = {}

    def clear(self) -> None:
        """Forget every graph: the caches have moved."""
        self._graphs.clear()

    def __call__(self, parts: Sequence[PromptPart]) -> list[Tensor]:
        """Read parts of texts, ``MOST`` tokens of each at most: the features [F] of each one's last token."""
        found: list[Tensor] = []
        for group in _launches(parts):
            found.extend(self._launch(group))
        return found

    def _launch(self, parts: Sequence[PromptPart]) -> Sequence[Tensor]:
        sizes, length = MANY, SEGMENT
        if len(parts) == 1:
            sizes, length = (1, *LONG), next((n for n in LENGTHS if len(parts[0].token_ids) <= n), LENGTHS[-1])
        segments, firsts, lasts = _segments(parts, length)
        size = next(n for n in sizes if len(segments) <= n)
        known = self._graphs.get((size, length))
        buffers = self._buffers(size, length) if known is None else known[0]
        numbers = torch.tensor(self._numbers(segments, size, length))
        if buffers.numbers.is_cuda:  # a copy from pageable memory would wait for the step in flight
            numbers = numbers.pin_memory()
        buffers.numbers.copy_(numbers, non_blocking=True)
        for first, part in zip(firsts, parts, strict=True):
            if part.before is not None:
                buffers.before[first].copy_(part.before)
        if known is None:
            with room_for(f"a graph that reads {size * length} tokens"):
                self._read(buffers)  # kernels compile; the replay writes the same again
                known = self._graphs[size, length] = buffers, *self._record(lambda: self._read(buffers))
        _, replay, ends = known
        replay()
        return [ends[last].clone() for last in lasts]

    def _buffers(self, size: int, length: int) -> _Buffers:
        target = self._target
        numbers = torch.zeros(size, 5 + length, dtype=torch.int64, device=target.device)
        return _Buffers(numbers, torch.zeros(size, target.feature_size, dtype=target.dtype, device=target.device))

    def _numbers(self, segments: Sequence[_Segment], size: int, length: int) -> list[list[int]]:
        """Those that are nobody's write behind all texts."""
        lines = [
            [s.row, s.start, s.start, len(s.tokens), s.opens, *s.tokens, *[0] * (length - len(s.tokens))]
            for s in segments
        ]
        nobodys = [0, 0, self._target.cache.slots - length, 0, FIRST, *[0] * length]
        return lines + [nobodys] * (size - len(lines))

    def _read(self, buffers: _Buffers) -> Tensor:
        """[S, F]: the features of every segment's last token."""
        row, start, slot, count, opens = buffers.numbers[:, :5].unbind(1)
        token_ids = buffers.numbers[:, 5:].contiguous()
        features_STF = self._target.read_chain(token_ids, start, row, slot)
        if self._drafter is not None:
            before = torch.cat([buffers.before[:1], features_STF[:-1, -1]])
            before = torch.where((opens == GOES_ON)[:, None], before, buffers.before)
            pairs = torch.cat([before[:, None], features_STF[:, :-1]], 1)
            kept = (count > 0)[:, None].expand_as(token_ids).clone()
            kept[:, 0] &= opens != FIRST
            self._drafter.read_at(Reading(pairs, token_ids, start - 1, count), row, kept)
        return features_STF[torch.arange(len(count), device=count.device), (count - 1).clamp(min=0)]


def _launches(parts: Sequence[PromptPart]) -> list[list[PromptPart]]:
    """In their order, as many together as one graph reads."""
    launches: list[list[PromptPart]] = []
    room = 0
    for part in parts:
        needed = -(-len(part.token_ids) // SEGMENT)
        if needed > room:
            launches.append([])
            room = MANY[-1]
        launches[-1].append(part)
        room -= needed
    return launches


def _segments(parts: Sequence[PromptPart], length: int) -> tuple[list[_Segment], list[int], list[int]]:
    """All parts in segments, and where each part's first and last are."""
    segments: list[_Segment] = []
    firsts, lasts = [], []
    for part in parts:
        firsts.append(len(segments))
        for at in range(0, len(part.token_ids), length):
            opens = GOES_ON if at else FIRST if part.before is None else AFTER
            segments.append(_Segment(part.row, part.start + at, part.token_ids[at : at + length], opens))
        lasts.append(len(segments) - 1)
    return segments, firsts, lasts
