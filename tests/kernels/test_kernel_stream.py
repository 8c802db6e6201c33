"""Products of 2 to 64 rows against plain torch."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.matmul import Workspace
from redrafter.backends.torch.kernels.rotate import interleaved
from redrafter.backends.torch.kernels.stream import (
    MAX_ROWS,
    SMALL_ROWS,
    Cut,
    Scaled,
    fits,
    most_rows,
    plan,
    scaled,
    stream,
)
from redrafter.backends.torch.kernels.tall import block_rows, fetched, tall

CUT = Cut(32, 32, 1, 4, 2)
X_FIRST = CUT._replace(x_first=True)
AHEAD = CUT._replace(ahead=True)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(torch.device("cpu"), 4 * 64 * 128, 16)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize(
    "cut",
    [
        *(cut._replace(split=split) for cut in (CUT, AHEAD) for split in (1, 2, 3)),
        *(X_FIRST._replace(split=split, ahead=ahead) for split in (1, 2) for ahead in (False, True)),
    ],
)
def test_a_product_with_all_around_it_and_the_norm_behind_it(rows: int, cut: Cut, workspace: Workspace) -> None:
    x, w, b, r = random(rows, 136, seed=1), random(72, 136, seed=2), random(72, seed=3), random(rows, 72, seed=4)
    gain, first = random(72, seed=5), random(136, seed=6)
    y, behind = stream(scaled(x, (first, 1e-5)), w, b, residual_MN=r, norm=(gain, 1e-4), workspace=workspace, cut=cut)
    expected = r + F.linear(F.rms_norm(x, (136,), first, 1e-5), w, b)
    close(y, expected)
    assert behind is not None and behind.squares.shape == (3, rows)
    close(behind.values, expected * gain)
    close(behind.squares.sum(0), expected.square().sum(1))
    assert workspace.arrived.sum() == 0
    second = random(40, 72, seed=7)
    normed = F.rms_norm(expected, (72,), gain, 1e-4)
    close(stream(behind, second, workspace=workspace, cut=CUT)[0], F.linear(normed, second))


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("cut", [CUT, X_FIRST, AHEAD, X_FIRST._replace(ahead=True)])
def test_gated(rows: int, cut: Cut, workspace: Workspace) -> None:
    x, w, gain = random(rows, 136, seed=1), random(80, 136, seed=2) / 10, random(136, seed=3)
    gate, up = F.linear(F.rms_norm(x, (136,), gain, 1e-5), w).chunk(2, -1)
    y, behind = stream(scaled(x, (gain, 1e-5)), interleaved(w, 80), gated=True, workspace=workspace, cut=cut)
    close(y, F.silu(gate) * up)
    assert behind is None


def test_a_row_does_not_depend_on_the_rows_beside_it(workspace: Workspace) -> None:
    x, w = random(20, 136, seed=1), random(72, 136, seed=2)
    whole = stream(x, w, workspace=workspace, cut=CUT)[0]
    assert torch.equal(stream(x[:3].contiguous(), w, workspace=workspace, cut=CUT)[0], whole[:3])


@pytest.mark.parametrize("cut", [CUT, X_FIRST, AHEAD])
def test_what_lies_behind_the_last_row_is_not_looked_at(cut: Cut, workspace: Workspace) -> None:
    x, w = random(20, 136, seed=1), random(72, 136, seed=2)
    alone = stream(x, w, workspace=workspace, cut=cut)[0]
    held = torch.full((32, 136), torch.nan)
    held[:20] = x
    assert fetched(x) == 20 and fetched(held[:20]) == 32 and fetched(held[12:]) == 20
    assert torch.equal(stream(held[:20], w, workspace=workspace, cut=cut)[0], alone)


@pytest.mark.parametrize("cut", [AHEAD, X_FIRST._replace(ahead=True)])
@pytest.mark.parametrize("size", [(64, 128), (72, 128), (64, 136)])
def test_blocks_that_fit_need_no_mask(size: tuple[int, int], cut: Cut, workspace: Workspace) -> None:
    w, x = random(*size, seed=2), tall((20, size[1]), torch.empty(0))
    x.copy_(random(20, size[1], seed=1))
    close(stream(x, w, workspace=workspace, cut=cut)[0], F.linear(x, w))


def test_what_a_product_reads_has_room_behind_it(workspace: Workspace) -> None:
    x, w, gain = random(20, 136, seed=1), random(72, 136, seed=2), random(72, seed=3)
    y, behind = stream(scaled(x, (random(136, seed=4), 1e-5)), w, norm=(gain, 1e-5), workspace=workspace, cut=CUT)
    assert behind is not None
    assert fetched(y) == fetched(behind.values) == fetched(scaled(x, (random(136, seed=4), 1e-5)).values) == 32
    assert fetched(tall((3, 5, 8), x).view(15, 8)) == 16
    assert fetched(tall((65, 8), x)) == 128 and fetched(tall((129, 8), x)) == 129


def test_cuts_fit_the_shared_memory_and_the_workspace() -> None:
    rooms = Workspace(torch.device("cpu"))
    for n, k in ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008), (960, 576), (576, 1536), (1536, 576)):
        for gated, rows in product((False, True), (2, 33, 64, 128)):
            if rows > MAX_ROWS and k > 2048:
                continue
            cut = plan(rows, n, k, gated)
            block = cut.BN * (2 if gated else 1) + block_rows(rows)
            assert block * cut.BK * 2 * cut.stages <= 227 * 1024
            assert cut.split == 1 or (not gated and cut.split * rows * n <= len(rooms.partial))
            assert -(-n // cut.BN) <= len(rooms.arrived)


def test_small_weights_take_more_rows(workspace: Workspace) -> None:
    x, w = random(100, 136, seed=1), random(72, 136, seed=2)
    close(stream(x, w, workspace=workspace, cut=X_FIRST._replace(ahead=True))[0], F.linear(x, w))
    assert most_rows(w, w) == SMALL_ROWS
    assert most_rows(w, torch.empty(8, 2048)) == most_rows(torch.empty(1 << 20, 8)) == MAX_ROWS


def test_what_fits() -> None:
    half = torch.zeros(8, 24, dtype=torch.float16)
    assert fits(half, half.bfloat16())
    assert not fits(half, half.float())
    assert not fits(half[:, :20])


def test_scaled_names_its_parts() -> None:
    x = random(3, 24, seed=1)
    found = scaled(x, (torch.full((24,), 2.0), 1e-6))
    assert isinstance(found, Scaled) and found.eps == 1e-6
    close(found.values, 2 * x)
    close(found.squares, x.square().sum(1)[None])
