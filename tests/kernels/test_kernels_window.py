"""The trunk's attention in one launch against the eager closure that it replaces."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import TorchDrafter
from redrafter.backends.torch.kernels.window import window_attention
from tests.tiny import drafter_config


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("window", [5, 512])
def test_pairs_see_the_window_and_are_kept(device: torch.device, heads: tuple[int, int], window: int) -> None:
    torch.manual_seed(0)
    config = drafter_config(trunk_heads=heads[0], trunk_kv_heads=heads[1], trunk_window=window)
    nothing = torch.zeros(1, 32, device=device)
    drafter = TorchDrafter(Drafter(config).to(device), lambda ids: nothing.expand(*ids.shape, 32), lambda x: x)
    drafter.allocate(3, 90)
    for cache in (*drafter._keys, *drafter._values):
        cache.normal_()
    width = config.width // heads[0]
    keys, values = drafter._keys[0].clone(), drafter._values[0].clone()
    first = torch.tensor([0, 70], device=device)
    q = torch.randn(2, 7, heads[0], width, device=device).transpose(1, 2)
    k, v = (torch.randn(2, heads[1], 7, width, device=device) for _ in range(2))
    attend = drafter._attention(slice(0, 2), first[:, None] + torch.arange(7, device=device))
    expected = attend(0, q, k, v)
    y = window_attention(q, k, v, keys, values, first, window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(keys, drafter._keys[0]) and torch.equal(values, drafter._values[0])
