"""Writes to the key/value cache against the eager cache, bit for bit."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch.graph import IDLE
from redrafter.backends.torch.kv_cache import KVCache
from redrafter.errors import UnsupportedModel
from tests.kernels.twins import random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.commit import KernelCache

SHAPES = [(3, 3, 24), (2, 2, 64), (2, 20, 96)]  # layers, heads, head width


def twins(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rows: int, slots: int
) -> list[KVCache]:
    caches = []
    for kind in (KVCache, KernelCache):
        cache = kind(*shape, dtype, device)
        cache.reserve(rows, slots)
        for seed, name in enumerate(("keys", "values")):
            getattr(cache, name).copy_(random(*cache.keys.shape, seed=seed))
        caches.append(cache)
    return caches


def same(eager: KVCache, kernel: KVCache) -> bool:
    return torch.equal(eager.keys, kernel.keys) and torch.equal(eager.values, kernel.values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_update(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    _, heads, width = shape
    eager, kernel = twins(shape, dtype, device, rows=3, slots=50)
    slots = torch.tensor([[40, 3, 9, 0, 41], [5, 6, 7, 8, 49]], device=device)
    # The strides of a product q|k|v: [B, N, (heads ..) * d].
    joint = random(2, 5, 3 * heads, width, seed=7).to(device)
    keys, values = (x.transpose(1, 2) for x in joint.split([2 * heads, heads], 2))
    keys = keys[:, heads:]
    for cache in (eager, kernel):
        cache.place(1, slots, 50)
        stored = cache.update(keys, values, 1)
        assert torch.equal(stored[0], cache.keys[1, 1:, :, :50]) and torch.equal(stored[1], cache.values[1, 1:, :, :50])
    assert same(eager, kernel)
    assert torch.equal(kernel.keys[1, 1, :, 9], keys[0, :, 2].to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_idle_row_keeps_nothing(shape: tuple[int, int, int], device: torch.device) -> None:
    """Its path may name nodes that lie behind the cache: a graph of 32 rows read there once, and a GPU refused."""
    _, cache = twins(shape, torch.float32, device, rows=2, slots=60)
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.keep_path(torch.tensor([IDLE, IDLE], device=device), torch.tensor([[0, 63, 40], [0, 5, 6]], device=device))
    assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keep_path(shape: tuple[int, int, int], device: torch.device) -> None:
    """Also where paths are padded by repeating a node or going back to the root, and where they overlap."""
    paths = [[0, 1, 2, 3, 4], [0, 3, 4, 9, 11], [0, 2, 2, 2, 2], [0, 5, 6, 0, 0], [0, 2, 3, 4, 5]]
    eager, kernel = twins(shape, torch.float32, device, rows=7, slots=60)
    before = kernel.keys.clone()
    lengths = torch.tensor([0, 7, 30, 44, 48], device=device)
    for cache in (eager, kernel):
        cache.keep_path(lengths, torch.tensor(paths, device=device))
    assert same(eager, kernel)
    assert torch.equal(kernel.keys[:, 1, :, 10], before[:, 1, :, 16])
    assert torch.equal(kernel.keys[:, 5:], before[:, 5:])
    kernel.keep_path(lengths, torch.tensor(paths, device=device)[:, :1])
    assert same(eager, kernel)


def test_a_layer_of_another_shape_is_refused(device: torch.device) -> None:
    kernel = twins((2, 2, 64), torch.float32, device, rows=1, slots=20)[1]
    wrong = torch.zeros(1, 4, 1, 64, device=device)
    with pytest.raises(UnsupportedModel, match="needs 2 heads"):
        kernel.update(wrong, wrong, 0)
