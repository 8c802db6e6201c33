"""The drafter's cell and residual block against plain torch."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.backends.torch.kernels.cell import block_and_cell, gated


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gru(table: torch.Tensor, index: torch.Tensor, old: torch.Tensor, u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r_w, z_w, n_w = table[index].chunk(3, -1)
    r_u, z_u, n_u = F.linear(old, u, b).chunk(3, -1)
    z = torch.sigmoid(z_w + z_u)
    return (1 - z) * torch.tanh(n_w + torch.sigmoid(r_w + r_u) * n_u) + z * old


def test_the_cell_of_the_beams_that_were_picked() -> None:
    table, state, u, b = random(11, 210, seed=1), random(3, 3, 70, seed=2), random(210, 70, seed=3), random(210)
    index, parent = torch.tensor([[10, 0, 3, 3]] * 3), torch.tensor([[2, 0, 0, 1], [1, 2, 2, 0], [0, 0, 2, 1]])
    expected = gru(table, index, state[torch.arange(3)[:, None], parent], u, b)
    torch.testing.assert_close(
        gated(table, index, state, parent, F.linear(state, u, b)), expected, rtol=1e-5, atol=1e-5
    )


def test_the_cell_of_the_same_beams() -> None:
    table, state, u, b = random(11, 120, seed=1), random(3, 1, 40, seed=2), random(120, 40, seed=3), random(120, seed=4)
    tokens = torch.tensor([[1, 2, 9], [1, 2, 0], [1, 2, 5]])[:, -1:]
    expected = gru(table, tokens, state, u, b)
    torch.testing.assert_close(gated(table, tokens, state, None, F.linear(state, u, b)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 40, 90])
@pytest.mark.parametrize("shared", [True, False])
def test_the_block_alone(rows: int, shared: bool) -> None:
    """80 rows of weights, more than a program takes."""
    x, w, r = random(rows, 72, seed=1), random(80, 72, seed=2), random(1 if shared else rows, 80, seed=3)
    both = F.linear(x, w) + r
    y, ahead = block_and_cell(x, w, r.expand(rows, 80), None)
    torch.testing.assert_close(y, both[:, 0::2] + F.silu(both[:, 1::2]), rtol=1e-5, atol=1e-5)
    assert ahead is None


@pytest.mark.parametrize("rows", [1, 12, 60])
@pytest.mark.parametrize("size", [16, 70, 140])
def test_the_block_and_the_cells_product(size: int, rows: int) -> None:
    outputs = 2 * 20
    x, weight, bias = random(rows, size, seed=1), random(outputs + 3 * size, size, seed=2), random(3 * size, seed=3)
    added = random(rows, outputs, seed=4)
    y, ahead = block_and_cell(x, weight, added, bias)
    assert ahead is not None
    torch.testing.assert_close(y, block_and_cell(x, weight[:outputs], added, None)[0], rtol=0, atol=0)
    torch.testing.assert_close(ahead, F.linear(x, weight[outputs:], bias), rtol=1e-5, atol=1e-4)


def test_half_precision() -> None:
    # Not bfloat16: triton's interpreter neither rounds nor multiplies it as a GPU does.
    x, w, r = (random(*shape, seed=n, dtype=torch.float16) for n, shape in enumerate([(5, 150), (80, 150), (5, 80)]))
    both = (F.linear(x.float(), w.float()) + r.float()).half()
    y, _ = block_and_cell(x, w, r, None)
    assert (y == both[:, 0::2] + F.silu(both[:, 1::2])).float().mean() > 0.9
    shapes = (9, 450), (1, 4, 150), (450, 150)
    table, state, u = (random(*shape, seed=n, dtype=torch.float16) for n, shape in enumerate(shapes))
    index, parent = torch.tensor([[3, 8, 0, 1]]), torch.tensor([[3, 0, 0, 1]])
    y = gated(table, index, state, parent, F.linear(state, u, table[0]))
    expected = gru(table.float(), index, state[:, parent[0]].float(), u.float(), table[0].float())
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
