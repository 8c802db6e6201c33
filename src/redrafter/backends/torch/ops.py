"""The algorithm's array functions on torch tensors (see ``algorithm/ops.py`` for what each promises)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_DTYPE = {bool: torch.bool, int: torch.int64, float: torch.float32}


class TorchOps:
    def arange(self, n: int, like: Tensor) -> Tensor:
        return torch.arange(n, device=like.device)

    def full(self, shape: Sequence[int], value: float | int | bool, like: Tensor) -> Tensor:
        return torch.full(tuple(shape), value, dtype=_DTYPE[type(value)], device=like.device)

    def int32(self, x: Tensor) -> Tensor:
        return x.to(torch.int32)

    def float32(self, x: Tensor) -> Tensor:
        return x.to(torch.float32)

    def where(self, condition: Tensor, a: Tensor | float | int, b: Tensor | float | int) -> Tensor:
        return torch.where(condition, a, b)

    def concat(self, arrays: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(arrays), axis)

    def stack(self, arrays: Sequence[Tensor], axis: int) -> Tensor:
        return torch.stack(list(arrays), axis)

    def take_along(self, x: Tensor, index: Tensor, axis: int) -> Tensor:
        return torch.gather(x, axis, index)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(x, k, dim=-1)
        return values, indices

    def argsort_descending(self, x: Tensor) -> Tensor:
        return torch.argsort(x, dim=-1, descending=True, stable=True)

    def argmax(self, x: Tensor) -> Tensor:
        return torch.argmax(x, dim=-1)

    def amax(self, x: Tensor) -> Tensor:
        return torch.amax(x, dim=-1, keepdim=True)

    def sum(self, x: Tensor) -> Tensor:
        return torch.sum(x, dim=-1)

    def cumsum(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, dim=-1)

    def sort_descending(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # numpy's vectorised sort takes a third of the time of torch's, which keeps indices
            return -torch.from_numpy(np.sort((-x).numpy(), axis=-1))
        return torch.sort(x, dim=-1, descending=True).values

    def logsumexp(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, dim=-1, keepdim=True)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=-1)

    def log(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def log1p(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def one_hot(self, index: Tensor, size: int) -> Tensor:
        return index[..., None] == torch.arange(size, device=index.device)

    def count_tokens(self, index: Tensor, weight: Tensor, size: int) -> Tensor:
        rows, nodes, items = weight.shape
        out = torch.zeros(rows, nodes, size, dtype=torch.float32, device=weight.device)
        return out.scatter_add_(2, index[:, None, :].expand(rows, nodes, items), weight)
