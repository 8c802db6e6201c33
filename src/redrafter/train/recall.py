"""What decoding looks up at every anchor of finished texts (``algorithm/lookup.py``): many ends of a few texts.

Legend: A anchors, S positions, L draft length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from redrafter.algorithm.lookup import MOST, UNKNOWN, Chain, find_chain
from redrafter.backends.torch.ops import TorchOps

AT_ONCE = 1 << 23
"""Tokens that are compared in one go."""


class Recall:
    """Of anchors that follow each other text by text, ``counts`` of each; their roots begin at ``starts``."""

    def __init__(
        self, texts: Sequence[np.ndarray], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        padded = np.full((len(texts), max(len(text) for text in texts)), UNKNOWN, dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, 1 : len(text)] = text[1:]  # a drafter reads pairs: the first token is no pair's second one
        self._texts = torch.from_numpy(padded).to(device)
        self._row_A = torch.from_numpy(np.repeat(np.arange(len(texts)), counts)).to(device)
        ends = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        self._end_A = torch.from_numpy(np.concatenate(ends)).to(device)

    def __call__(self, here: slice, length: int) -> Chain:
        rows, ends = self._row_A[here], self._end_A[here]
        slots = int(ends.max()) + 1
        parts = [
            find_chain(TorchOps(), self._texts[row, :slots], end, length)
            for row, end in zip(*(x.split(max(1, AT_ONCE // (slots * MOST))) for x in (rows, ends)), strict=True)
        ]
        return Chain(*(torch.cat(arrays) for arrays in zip(*parts, strict=True)))
