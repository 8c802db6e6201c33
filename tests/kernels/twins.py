"""The eager side of the kernel tests: the algorithm's own text, with the ties of top-k broken as the kernels do."""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.backends.torch.ops import TorchOps


class StableOps(TorchOps):
    """``torch.topk`` leaves the order of equal values open; here the lowest index wins."""

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = torch.sort(x, dim=-1, descending=True, stable=True)
        return values[..., :k], index[..., :k]


OPS = StableOps()


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def in_pairs(x: Tensor) -> Tensor:
    """[.., d] with columns j and j + d / 2 beside each other, as the GPU's layers keep queries and keys."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
