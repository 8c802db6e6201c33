"""The noise kernel against the algorithm's text."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm import noise as eager
from tests.kernels.twins import OPS

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels.noise import gumbel, gumbel_of_bits, random_bits

KEYS = [eager.key_of(3), eager.key_of(2**63 + 11, 5), (-(2**31), 2**31 - 1)]


def inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(KEYS, device=device), torch.tensor([0, 4095, 2**31 - 2], device=device)


def positions(lengths: torch.Tensor) -> torch.Tensor:
    return lengths[:, None] + 1 + torch.arange(3, device=lengths.device)


@pytest.mark.parametrize("vocabulary", [1, 1024, 2500])
def test_bits_are_the_algorithms(vocabulary: int, device: torch.device) -> None:
    key, lengths = inputs(device)
    expected = eager.random_bits(OPS, key, positions(lengths), torch.arange(vocabulary, device=device))
    assert torch.equal(random_bits(key, lengths, 3, vocabulary), expected)


def test_noise_is_the_algorithms_to_rounding(device: torch.device) -> None:
    key, lengths = inputs(device)
    expected = eager.gumbel(OPS, key, positions(lengths), torch.arange(4_000, device=device))
    got = gumbel(key, lengths, 3, 4_000)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert expected.max() > 8  # the tail that decides draws was looked at


def test_noise_at_the_ends_of_the_uniform(device: torch.device) -> None:
    """Few keys reach the extreme bits, so they are given directly."""
    import triton
    import triton.language as tl

    @triton.jit
    def apply(bits, out, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(out + at, gumbel_of_bits(tl.load(bits + at)))

    words = [0, 1, 2, 3, 65535, 65536, 2**20, 2**24, 2**30, 2**31 - 1, -(2**31), -(2**20), -65536, -257, -2, -1]
    bits = torch.tensor(words, dtype=torch.int32, device=device)
    got = torch.empty(16, dtype=torch.float32, device=device)
    apply[(1,)](bits, got, COUNT=16)
    u = ((bits.double() % 2**32 + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24).double()
    expected = -torch.log(-torch.log1p(-u))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert bool(torch.isfinite(got).all())
