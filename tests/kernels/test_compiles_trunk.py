"""The kernels of the drafter's own network compile for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")
from redrafter.backends.torch.kernels import cell, copies, early, trunk, window
from tests.kernels.test_compiles import Compiled


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    names: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(early, "_hopper", lambda device: True)
    kernels = ((cell, "_block_and_cell"), (cell, "_gates"), (copies, "_copies"))
    for module, name in (*kernels, (trunk, "_scaled_parts"), (window, "_window_attention")):
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), names))
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trunk_and_cell_compile(done: list[str], dtype: torch.dtype) -> None:
    tokens, one = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    trunk.scaled_parts(torch.zeros(2, 9, 3 * 576, dtype=dtype), tokens, torch.zeros(50, 576, dtype=dtype))
    q, k = torch.zeros(2, 9, 9, 64, dtype=dtype), torch.zeros(2, 3, 9, 64, dtype=dtype)
    kept, angle = torch.zeros(2, 3, 900, 64, dtype=dtype), torch.zeros(900, 64, dtype=dtype)
    window.window_attention((q, k, k), (kept, kept), one, 512)
    window.window_attention((q, k, k), (kept, kept), one, 512, window.Rotation(angle, angle), one)
    table, u = torch.zeros(50, 3 * 576, dtype=dtype), torch.zeros(3 * 576, 576, dtype=dtype)
    state = torch.zeros(2, 8, 576, dtype=dtype)
    cell.block_and_cell(state[0], u[:1152], table[:8, :1152], None)
    for rows in (64, 128, 8):
        both, added = torch.cat([u[:1152], u]), torch.zeros(rows, 1152, dtype=dtype)
        _, ahead = cell.block_and_cell(state[0, :1].repeat(rows, 1), both, added, table[0])
    assert ahead is not None
    cell.gated(table, tokens[:1, :8].contiguous(), state[:1], tokens[:1, :8].contiguous(), ahead[None])
    cell.gated(table, tokens[:, -1:], state[:, :1].contiguous(), None, ahead[:2, None])
    copies.copy_together([(state, state), (tokens, tokens)])
    cells = [*4 * ["_block_and_cell"], "_gates", "_gates"]
    assert done == ["_scaled_parts", "_window_attention", "_window_attention", *cells, "_copies"]
