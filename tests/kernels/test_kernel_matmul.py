"""Products of few rows against plain torch."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from redrafter.backends.torch.kernels.matmul import Norm, Workspace, _Plan, few_rows
from redrafter.backends.torch.kernels.rotate import interleaved


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("norm", [None, "plain", "weighted"])
def test_norm_bias_activation_and_residual(rows: int, norm: str | None) -> None:
    x, w, b, r = random(rows, 72, seed=1), random(40, 72, seed=2), random(40, seed=3), random(rows, 40, seed=4)
    gain = random(72, seed=5)
    n = x
    if norm is not None:
        n = F.rms_norm(x, (72,), gain if norm == "weighted" else None, 1e-5)
    setting = None if norm is None else Norm(gain if norm == "weighted" else None, 1e-5)
    y = few_rows(x, w, b, norm=setting, residual_MN=r, silu=True)
    torch.testing.assert_close(y, r + F.silu(F.linear(n, w, b)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few_rows(x, w, norm=setting), F.linear(n, w), rtol=1e-5, atol=1e-5)


def test_one_residual_for_every_row() -> None:
    x, w, r = random(4, 72, seed=1), random(40, 72, seed=2), random(1, 40, seed=3)
    y = few_rows(x, w, residual_MN=r.expand(4, 40))
    torch.testing.assert_close(y, r + F.linear(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_gated(rows: int) -> None:
    x, w = random(rows, 72, seed=1), random(80, 72, seed=2)
    gain = random(72, seed=5)
    gate, up = F.linear(F.rms_norm(x, (72,), gain, 1e-5), w).chunk(2, -1)
    y = few_rows(x, interleaved(w, 80), norm=Norm(gain, 1e-5), gated=True)
    torch.testing.assert_close(y, F.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_split_sums_leave_the_counters_at_zero(split: int, backwards: bool) -> None:
    x, w, r = random(5, 300, seed=1), random(70, 300, seed=2), random(5, 70, seed=3)
    workspace = Workspace(x.device, 4 * 5 * 70, 8)
    for _ in range(2):
        cut: Any = {"plan": _Plan(32, 32, split, 4, 2), "backwards": backwards}
        y = few_rows(x, w, residual_MN=r, workspace=workspace, **cut)
        torch.testing.assert_close(y, r + F.linear(x, w), rtol=1e-5, atol=1e-4)
        assert workspace.arrived.sum() == 0


@pytest.mark.parametrize("rows", [1, 4])
def test_half_precision_rounds_where_torch_does(rows: int) -> None:
    # Not bfloat16: triton's interpreter neither rounds nor multiplies it as a GPU does.
    x, w = random(rows, 64, seed=1, dtype=torch.float16), random(64, 64, seed=2, dtype=torch.float16)
    gate, up = F.linear(x, w).chunk(2, -1)
    y = few_rows(x, interleaved(w, 64), gated=True)
    assert (y == F.silu(gate) * up).float().mean() > 0.9
