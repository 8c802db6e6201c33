"""The target writes: batches of thousands of rows, continued until their end token, without one sync per token.

Legend: B rows, P prompt tokens (padded on the left), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from redrafter.algorithm.noise import gumbel
from redrafter.backends.torch.ops import TorchOps
from redrafter.train.target import BatchCache, TrainingTarget, cap

LOOP_SHARE = 0.6
"""A text with fewer distinct 4-grams than this share of all is looping."""
_PICK_ROWS, _PREFILL_TOKENS = 1024, 65536


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """max_new: tokens per row; temperature: 0 is greedy; check_every: tokens between looks at who has finished;
    drop_loops: rows that loop stop early; tail: share of the rows at which the stragglers are cut."""

    max_new: int = 384
    temperature: float = 0.0
    check_every: int = 32
    drop_loops: bool = True
    tail: float = 0.0


class Text(NamedTuple):
    """What one row became. ``ended``: its last token is the end token; ``looped``: it was stopped for repeating."""

    row: int
    tokens: np.ndarray
    ended: bool
    looped: bool


def distinct_share(tokens: Tensor) -> Tensor:
    """[B, T] -> [B]: distinct 4-grams over all 4-grams; 1 for fewer than four tokens."""
    if tokens.shape[1] < 4:
        return torch.ones(tokens.shape[0], device=tokens.device)
    x = tokens.long()
    gram = ((x[:, :-3] * 65599 + x[:, 1:-2]) * 65599 + x[:, 2:-1]) * 65599 + x[:, 3:]
    ordered = gram.sort(dim=1).values
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)).float() / gram.shape[1]


def loops(tokens: np.ndarray) -> bool:
    t = tokens.tolist()
    return len(t) >= 4 and len(set(zip(t, t[1:], t[2:], t[3:], strict=False))) < LOOP_SHARE * (len(t) - 3)


class Draw(NamedTuple):
    """How a token is drawn at a temperature over 0: with a generator's noise, or with that of keys (rows must then
    be written to one answer each, whatever batch they are in)."""

    temperature: float
    generator: torch.Generator
    key_B2: Tensor | None = None
    position_B: Tensor | None = None
    """absolute position of the token that is drawn"""

    def noise(self, logits_BV: Tensor, rows: slice) -> Tensor:
        if self.key_B2 is None or self.position_B is None:
            return torch.empty_like(logits_BV).exponential_(generator=self.generator).log_().neg_()
        token_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        return gumbel(TorchOps(), self.key_B2[rows], self.position_B[rows, None], token_V)[:, 0]


def pick(hidden_BD: Tensor, head_VD: Tensor, draw: Draw | None, softcap: float = 0.0) -> Tensor:
    """[B] next tokens: argmax, or a draw from softmax(logits / T) as argmax(logits / T + Gumbel noise)."""
    out = []
    for first in range(0, len(hidden_BD), _PICK_ROWS):
        rows = slice(first, first + _PICK_ROWS)
        logits = cap(hidden_BD[rows].float() @ head_VD.T, softcap)
        if draw is not None:
            logits = logits.mul_(1 / draw.temperature).add_(draw.noise(logits, rows))
        out.append(logits.argmax(-1))
    return torch.cat(out)


class Writer:
    """Continues batches of prompts. The head is kept in float32: bf16 logits tie too often."""

    def __init__(self, target: TrainingTarget, end_ids: Iterable[int], cache_tokens: int) -> None:
        self.target = target
        self.end = torch.tensor(sorted(set(end_ids)), device=target.device)
        self.head = target.float_head()
        self.cache = BatchCache(target.config, cache_tokens, target.device, target.embedding.dtype)
        self.generator = torch.Generator(target.device).manual_seed(0)
        self.raw_tokens = 0

    def rows_that_fit(self, length: int, config: WritingConfig) -> int:
        return max(1, self.cache.tokens // (length + config.max_new))

    @torch.inference_mode()
    def write(
        self, prompts: list[np.ndarray], config: WritingConfig, keys: Sequence[tuple[int, int]] | None = None
    ) -> list[Text]:
        """One text per prompt, in no particular order. ``keys``: each prompt's noise key, at a temperature over 0."""
        device = self.target.device
        tokens_BP, pad_B = _left_pad(prompts)
        length = tokens_BP.shape[1]
        self.cache.shape(len(prompts), length + config.max_new)
        pad_B = pad_B.to(device)
        ragged = bool(pad_B.any())
        hidden_BD = self._prefill(tokens_BP.to(device), pad_B, ragged)
        out_BN = torch.zeros(len(prompts), config.max_new, dtype=torch.int32, device=device)
        ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        row_B = torch.arange(len(prompts), device=device)
        slots = torch.arange(length + config.max_new, device=device)
        key_B2 = None if keys is None else torch.tensor(keys, device=device)
        texts: list[Text] = []
        for i in range(config.max_new):
            draw = None
            if config.temperature > 0:
                draw = Draw(config.temperature, self.generator, key_B2, length + i - pad_B)
            token_B = pick(hidden_BD, self.head, draw, self.target.softcap)
            out_BN[:, i] = token_B
            ended_B |= torch.isin(token_B, self.end)
            self.raw_tokens += len(token_B)
            last = i + 1 == config.max_new
            if (i + 1) % config.check_every == 0 or last:
                looped_B = _stuck(out_BN[:, : i + 1]) & ~ended_B if config.drop_loops else ended_B & False
                done_B = ended_B | looped_B
                alive = int((~done_B).sum())
                if last or alive <= config.tail * len(prompts):
                    return texts + _harvest(row_B, out_BN[:, : i + 1], self.end, looped_B)
                if alive < 0.85 * len(row_B):
                    texts += _harvest(row_B[done_B], out_BN[done_B, : i + 1], self.end, looped_B[done_B])
                    index = (~done_B).nonzero()[:, 0]
                    self.cache.keep(index, length + i)
                    row_B, out_BN, ended_B, pad_B, token_B = (
                        x[index] for x in (row_B, out_BN, ended_B, pad_B, token_B)
                    )
                    key_B2 = None if key_B2 is None else key_B2[index]
            self.cache.window(0, len(row_B), length + i)
            mask = (slots[: length + i + 1] >= pad_B[:, None])[:, None, None] if ragged else None
            position_B1 = (length + i - pad_B)[:, None]
            hidden_BD = self.target.hidden(token_B[:, None], position_B1, mask, self.cache)[:, -1]
        return texts

    def _prefill(self, tokens_BP: Tensor, pad_B: Tensor, ragged: bool) -> Tensor:
        rows, length = tokens_BP.shape
        column = torch.arange(length, device=tokens_BP.device)
        out = []
        step = max(1, _PREFILL_TOKENS // length)
        for first in range(0, rows, step):
            pad = pad_B[first : first + step, None]
            mask = None
            if ragged:
                # A padding column sees itself, so that no row of the softmax is empty.
                seen = (column[None, :] <= column[:, None]) & (column >= pad[:, :, None])
                mask = (seen | torch.eye(length, dtype=torch.bool, device=column.device))[:, None]
            self.cache.window(first, len(pad), 0)
            position = (column - pad).clamp(min=0)
            out.append(self.target.hidden(tokens_BP[first : first + step], position, mask, self.cache)[:, -1])
        return torch.cat(out)


def _left_pad(prompts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    length = max(len(p) for p in prompts)
    tokens = np.zeros((len(prompts), length), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
    return torch.from_numpy(tokens), torch.tensor([length - len(p) for p in prompts])


def _stuck(tokens: Tensor) -> Tensor:
    """[B] bool: repeating over all of the text so far, or over its last 96 tokens beyond return."""
    if tokens.shape[1] < 96:
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return (distinct_share(tokens) < LOOP_SHARE) | (distinct_share(tokens[:, -96:]) < 0.25)


def _harvest(row: Tensor, tokens: Tensor, end: Tensor, looped: Tensor) -> list[Text]:
    is_end = torch.isin(tokens, end)
    ended = is_end.any(1)
    count = torch.where(ended, is_end.int().argmax(1) + 1, tokens.shape[1])
    columns = (x.cpu().numpy() for x in (row, tokens, ended, count, looped))
    return [Text(int(r), t[:n].copy(), bool(e), bool(bad and not e)) for r, t, e, n, bad in zip(*columns, strict=True)]
