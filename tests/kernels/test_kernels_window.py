"""The trunk's attention in one launch against the eager closure that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.graph import IDLE
from redrafter.backends.torch.kernels.window import Rotation, window_attention
from redrafter.backends.torch.trunk import rotary, rotate
from tests.tiny import drafter_config

PAIRS = 7
HEADS = pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
WINDOWS = pytest.mark.parametrize("window", [5, 512])


def kept(device: torch.device, heads: tuple[int, int], window: int) -> TorchDrafter:
    """A drafter with room for 3 rows of 154 slots, full of numbers."""
    torch.manual_seed(0)
    config = drafter_config(width=24, trunk_heads=heads[0], trunk_kv_heads=heads[1], trunk_window=window)
    nothing = torch.zeros(1, 32, device=device)
    drafter = TorchDrafter(Drafter(config).to(device), lambda ids: nothing.expand(*ids.shape, 32), lambda x: x)
    drafter.allocate(3, 90)
    for cache in (*drafter._keys, *drafter._values):
        cache.normal_()
    return drafter


def new_heads(device: torch.device, rows: int, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """As they lie in one product's output."""
    qkv = torch.randn(rows, PAIRS, heads[0] + 2 * heads[1], 24 // heads[0], device=device).transpose(1, 2)
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], 1)
    return q, k, v


@HEADS
@WINDOWS
def test_pairs_see_the_window_and_are_kept(device: torch.device, heads: tuple[int, int], window: int) -> None:
    drafter = kept(device, heads, window)
    keys, values = drafter._keys[0].clone(), drafter._values[0].clone()
    first = torch.tensor([0, 70], device=device)
    q, k, v = new_heads(device, 2, heads)
    attend = drafter._attention(slice(0, 2), first[:, None] + torch.arange(PAIRS, device=device))
    expected = attend(0, q, k, v)
    y = window_attention((q, k, v), (keys, values), first, window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(keys, drafter._keys[0]) and torch.equal(values, drafter._values[0])


@HEADS
@WINDOWS
def test_the_last_pair_alone_asks_and_heads_are_rotated(
    device: torch.device, heads: tuple[int, int], window: int
) -> None:
    drafter = kept(device, heads, window)
    keys, values = drafter._keys[0].clone(), drafter._values[0].clone()
    slots, width = keys.shape[2:]
    rotation = Rotation(*(x[0, 0] for x in rotary(torch.arange(slots, device=device)[None], width, keys.dtype)))
    first = torch.tensor([-1, 70, IDLE], device=device)
    count = torch.tensor([1, 4, PAIRS], device=device)
    q, k, v = new_heads(device, 3, heads)
    for row, c in enumerate(count.tolist()):
        q[row, :, c:] = q[row, :, c - 1 : c]
    position = torch.tensor([0, 70, slots - PAIRS], device=device)[:, None] + torch.arange(PAIRS, device=device)
    rope = rotary(position, width, q.dtype)
    expected = drafter._attention(slice(0, 3), position)(0, rotate(q, *rope), rotate(k, *rope), v)
    y = window_attention((q, k, v), (keys, values), first, window, rotation, count)
    rows = torch.arange(3, device=device)
    torch.testing.assert_close(y[:, :, 0], expected[rows, :, count - 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys, drafter._keys[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(values, drafter._values[0])
