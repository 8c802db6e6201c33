"""The drafter's cell and residual block against plain torch."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.backends.torch.kernels.cell import block_and_cell, gated, gru_step, residual_block


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gru(table: torch.Tensor, index: torch.Tensor, old: torch.Tensor, u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r_w, z_w, n_w = table[index].chunk(3, -1)
    r_u, z_u, n_u = F.linear(old, u, b).chunk(3, -1)
    z = torch.sigmoid(z_w + z_u)
    return (1 - z) * torch.tanh(n_w + torch.sigmoid(r_w + r_u) * n_u) + z * old


@pytest.mark.parametrize("rows", [1, 3, 9])  # of 4 beams: 9 rows are more than one program takes
def test_gru_step(rows: int) -> None:
    table, state, u, b = random(11, 210, seed=1), random(rows, 3, 70, seed=2), random(210, 70, seed=3), random(210)
    index, parent = torch.tensor([[10, 0, 3, 3]] * rows), torch.tensor([[2, 0, 0, 1], [1, 2, 2, 0], [0, 0, 2, 1]])
    parent, index = parent[torch.arange(rows) % 3].contiguous(), (index + torch.arange(rows)[:, None]) % 11
    expected = gru(table, index, state[torch.arange(rows)[:, None], parent], u, b)
    torch.testing.assert_close(gru_step(table, index, state, parent, u, b), expected, rtol=1e-5, atol=1e-5)


def test_gru_step_of_the_same_beams() -> None:
    table, state, u, b = random(11, 120, seed=1), random(3, 1, 40, seed=2), random(120, 40, seed=3), random(120, seed=4)
    tokens = torch.tensor([[1, 2, 9], [1, 2, 0], [1, 2, 5]])[:, -1:]
    expected = gru(table, tokens, state, u, b)
    torch.testing.assert_close(gru_step(table, tokens, state, None, u, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_residual_block(rows: int, shared: bool) -> None:
    x, w, r = random(rows, 72, seed=1), random(80, 72, seed=2), random(1 if shared else rows, 80, seed=3)
    a, b = (F.linear(x, w) + r).chunk(2, -1)
    y = residual_block(x, w, r.expand(rows, 80))
    torch.testing.assert_close(y, a + F.silu(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("size", [16, 70, 140])
def test_the_cells_product_ahead_of_the_choice(size: int, beams: int) -> None:
    """The block beside U s + bias, then the states of the beams that were picked: as one after the other."""
    rows, outputs = 3, 2 * 20
    table, state, bias = random(11, 3 * size, seed=1), random(rows, beams, size, seed=2), random(3 * size, seed=3)
    weight, added = random(outputs + 3 * size, size, seed=4), random(rows * beams, outputs, seed=5)
    flat = state.view(rows * beams, size)
    y, ahead = block_and_cell(flat, weight, added, bias)
    u = weight[outputs:].contiguous()
    torch.testing.assert_close(y, residual_block(flat, weight[:outputs].contiguous(), added), rtol=0, atol=0)
    torch.testing.assert_close(ahead, F.linear(flat, u, bias), rtol=1e-5, atol=1e-4)
    index = torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(6))
    parent = torch.randint(0, beams, (rows, 5), generator=torch.Generator().manual_seed(7))
    found = gated(table, index, state, parent, ahead.view(rows, beams, -1))
    torch.testing.assert_close(found, gru_step(table, index, state, parent, u, bias), rtol=1e-5, atol=1e-5)


def test_half_precision() -> None:
    # Not bfloat16: triton's interpreter neither rounds nor multiplies it as a GPU does.
    x, w, r = (random(*shape, seed=n, dtype=torch.float16) for n, shape in enumerate([(5, 150), (80, 150), (5, 80)]))
    a, b = (F.linear(x.float(), w.float()) + r.float()).half().chunk(2, -1)
    assert (residual_block(x, w, r) == a + F.silu(b)).float().mean() > 0.9
    shapes = (9, 450), (1, 4, 150), (450, 150)
    table, state, u = (random(*shape, seed=n, dtype=torch.float16) for n, shape in enumerate(shapes))
    index, parent = torch.tensor([[3, 8, 0, 1]]), torch.tensor([[3, 0, 0, 1]])
    y = gru_step(table, index, state, parent, u, table[0])
    expected = gru(table.float(), index, state[:, parent[0]].float(), u.float(), table[0].float())
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
