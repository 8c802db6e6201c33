"""A stand-in for a GPU: a backend whose steps take a fixed time and almost no processor time of the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redrafter import LLM, DecodeConfig
from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.step import DecodeState, advance
from redrafter.algorithm.tree import TokenTree
from redrafter.backends import base
from redrafter.backends.base import Fetched
from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from tests.server.serving import tiny_llm

STEP, PROMPT = 0.006, 0.005
"""seconds of a step and of a prompt's chunk: those of the 7B shape at 8 rows on an H200"""
ACCEPTED = 2
"""drafted tokens that every step accepts"""
WORDS = "the quick brown fox jumps over the lazy dog. "


class _Due(NamedTuple):
    handle: Fetched
    at: float


class PacedBackend(TorchBackend):
    """Work queues up as on a device: a call returns at once, and ``read`` sleeps until the step's time has come."""

    def __init__(self, inner: TorchBackend, text: Sequence[int], step: float, prompt: float) -> None:
        super().__init__(inner.target, None, inner.context_limit, inner.eos_ids)
        self.drafter = inner.drafter
        self._text = torch.tensor(text)
        self.run_ahead = True
        self._step, self._prompt = step, prompt
        self._due = 0.0

    def _queue(self, seconds: float) -> None:
        self._due = max(self._due, time.perf_counter()) + seconds

    def prefill_chunk(self, row: int, token_ids: Sequence[int], start: int, before: Any) -> tuple[Tensor, int]:
        self._queue(self._prompt)
        return self.no_features(), min(start + base.PREFILL_CHUNK, len(token_ids))

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        self._queue(self._step)
        rows, depths = len(state.root), config.draft_length + 1 if config.speculative else 1
        length = torch.full((rows,), min(ACCEPTED, depths - 1))
        tokens = self._text[(state.lengths[:, None] + torch.arange(depths)) % len(self._text)]
        tree = _tree(state.root, config.tree_size)
        accepted = Accepted(torch.zeros(rows, depths, dtype=torch.int64), length, tokens[:, 0], tokens, length >= 0)
        features = torch.zeros(rows, 1, self.target.feature_size, dtype=self.target.dtype)
        return advance(self.ops, state, features, accepted), accepted, tree

    def fetch(self, accepted: Accepted, tree: TokenTree) -> Any:
        return _Due(super().fetch(accepted, tree), self._due)

    def read(self, handle: Any) -> Any:
        time.sleep(max(handle.at - time.perf_counter(), 0.0))
        return super().read(handle.handle)

    def synchronize(self) -> None:
        time.sleep(max(self._due - time.perf_counter(), 0.0))


def _tree(root: Tensor, size: int) -> TokenTree:
    """Of the right shape; nobody looks into it."""
    rows = len(root)
    zeros = torch.zeros(rows, size, dtype=torch.int64)
    itself = torch.eye(size, dtype=torch.bool).expand(rows, -1, -1)
    return TokenTree(zeros + root[:, None], zeros, zeros, itself, zeros == 0)


def paced_llm(*, context: int = 256, max_batch: int = 8, step: float = STEP, prompt: float = PROMPT) -> LLM:
    """Says the same line again and again, three tokens a step, whatever it is asked."""
    llm = tiny_llm(context=context, max_batch=max_batch)
    shape = DecodeConfig(beam_width=3, branching=3, draft_length=5, tree_size=10)
    backend = PacedBackend(llm.engine.backend, llm.tokenizer.encode(WORDS), step, prompt)
    backend.reserve(max_batch, context + 32)
    return LLM(Engine(backend, shape, max_batch), llm.tokenizer, model="paced", drafter="paced")
