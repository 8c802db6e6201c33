"""The rotation at the end of a product against one in a launch of its own: the same bits."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from tests.kernels.twins import random

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.commit import KernelCache
from redrafter.backends.torch.kernels.matmul import Workspace
from redrafter.backends.torch.kernels.norms import rope_write
from redrafter.backends.torch.kernels.rotate import Rotation, interleaved
from redrafter.backends.torch.kernels.stream import Cut, scaled, stream

CUTS = [
    Cut(32, 32, 1, 4, 2),
    Cut(16, 32, 2, 4, 2, x_first=True),
    Cut(8, 32, 1, 4, 2, ahead=True),
    Cut(32, 32, 1, 4, 2, x_first=True, ahead=True),
]


def filled(rows: int, tokens: int, kv_heads: int, width: int, dtype: torch.dtype) -> KernelCache:
    """Token n of row b goes to slot 7 b + 3 n."""
    cache = KernelCache(1, kv_heads, width, dtype, torch.device("cpu"))
    cache.reserve(rows, 100)
    cache.place(0, 7 * torch.arange(rows)[:, None] + 3 * torch.arange(tokens), 100)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 17), (3, 5)])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "bias"), [(4, 2, 16, True), (2, 1, 32, False)])
def test_it_is_the_twins_bit_for_bit(
    rows: int, tokens: int, heads: int, kv_heads: int, width: int, bias: bool, cut: Cut, dtype: torch.dtype
) -> None:
    count, outputs = rows * tokens, (heads + 2 * kv_heads) * width
    x, w = random(count, 72, seed=1).to(dtype), random(outputs, 72, seed=2).to(dtype)
    b = random(outputs, seed=3).to(dtype) if bias else None
    angle = random(rows, tokens, width // 2, seed=4)
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angle.cos(), angle.sin()))
    workspace, n = Workspace(torch.device("cpu"), 4 * 64 * 128, 16), scaled(x, (random(72, seed=5).to(dtype), 1e-5))
    mine, twin = (filled(rows, tokens, kv_heads, width, dtype) for _ in range(2))
    rotation = Rotation(cos, sin, mine.layer(0))
    assert rotation.heads(outputs) == (heads, kv_heads, width) and rotation.fits(outputs, cut.BN)
    q, _ = stream(n, w, b, rotation=rotation, workspace=workspace, cut=cut)
    qkv, _ = stream(n, w, b, workspace=workspace, cut=cut)
    expected = rope_write(qkv.view(rows, tokens, -1), Rotation(cos, sin, twin.layer(0)))
    assert torch.equal(q.view(rows, tokens, heads, width).transpose(1, 2), expected)
    assert torch.equal(mine.keys, twin.keys) and torch.equal(mine.values, twin.values)
    assert mine.keys.any() and mine.values.any() and expected.any()


def test_interleaved_halves() -> None:
    rows = torch.arange(16)
    assert interleaved(rows, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    pairs = interleaved(rotate_half(rows.view(2, 8)).flatten(), 8).view(-1, 2)
    expected = interleaved(rows, 8).view(-1, 2)
    assert torch.equal(pairs, torch.stack([-expected[:, 1], expected[:, 0]], 1))


def test_a_tile_is_of_one_kind_and_holds_both_of_a_pair() -> None:
    cache = filled(1, 1, 2, 24, torch.float32)
    rotation = Rotation(torch.zeros(1, 1, 24), torch.zeros(1, 1, 24), cache.layer(0))
    fits = [tile for tile in (1, 2, 4, 8, 16, 32) if rotation.fits((6 + 2 * 2) * 24, tile)]
    assert fits == [2, 4, 8, 16]
