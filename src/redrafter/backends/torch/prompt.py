"""Reading a prompt with a CUDA graph: launched one by one, a layer's kernels cost more time than they take.

Tokens are padded to one of a few lengths. What the pads leave in the caches lies behind the text and is overwritten
before anything looks there. Its slow twin is ``BaseBackend.prefill_chunk``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.beam import Reading
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.gpu import room_for
from redrafter.backends.torch.graph import Record
from redrafter.backends.torch.target import TorchTarget

LENGTHS = (16, 32, 64, 128)
"""A graph for each; longer prompts are read in parts of the last, the most nodes that the attention kernel takes."""


class _Buffers(NamedTuple):
    numbers: Tensor  # [3 + T] int64: row, start, count, tokens
    before: Tensor  # [F] features of the token before


class PromptReader:
    def __init__(self, target: TorchTarget, drafter: TorchDrafter | None, record: Record) -> None:
        self._target, self._drafter, self._record = target, drafter, record
        self._graphs: dict[int, tuple[_Buffers, Callable[[], None], Tensor]] = {}

    def clear(self) -> None:
        """Forget every graph: the caches have moved."""
        self._graphs.clear()

    def __call__(self, row: int, token_ids: Sequence[int], start: int, before: Tensor | None) -> Tensor:
        """Read up to ``LENGTHS[-1]`` tokens of a row from ``start``; ``before``: the features of the token before them,
        None at the beginning of a text. The features [F] of the last one."""
        length = next(n for n in LENGTHS if len(token_ids) <= n)
        known = self._graphs.get(length)
        buffers = self._buffers(length) if known is None else known[0]
        pads = [0] * (length - len(token_ids))
        numbers = torch.tensor([row, start, len(token_ids), *token_ids, *pads])
        if buffers.numbers.is_cuda:  # a copy from pageable memory would wait for the step in flight
            numbers = numbers.pin_memory()
        buffers.numbers.copy_(numbers, non_blocking=True)
        if before is not None:
            buffers.before.copy_(before)
        if known is None:
            with room_for(f"a graph that reads {length} tokens"):
                self._read(buffers)  # kernels compile; the replay writes the same again
                known = self._graphs[length] = buffers, *self._record(lambda: self._read(buffers))
        _, replay, last = known
        replay()
        return last.clone()

    def _buffers(self, length: int) -> _Buffers:
        target = self._target
        numbers = torch.zeros(3 + length, dtype=torch.int64, device=target.device)
        return _Buffers(numbers, torch.zeros(target.feature_size, dtype=target.dtype, device=target.device))

    def _read(self, buffers: _Buffers) -> Tensor:
        row, start, count = buffers.numbers[:3].split(1)
        token_ids = buffers.numbers[3:]
        features_TF = self._target.read_chain(token_ids[None], start, row)
        if self._drafter is not None:
            # The pair of a text's first token has no place: it goes behind all texts (``read_at``).
            pairs = torch.cat([buffers.before[None], features_TF[:-1]])
            self._drafter.read_at(Reading(pairs[None], token_ids[None], start - 1, count), row)
        return features_TF[count - 1][0]
