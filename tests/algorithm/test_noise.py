"""The counter RNG against pure Python, fixed values, and what Gumbel noise must look like."""

from __future__ import annotations

import math

import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import OPS

from redrafter.algorithm import noise as noise_module
from redrafter.algorithm.noise import gumbel, key_of, mix_int, random_bits


def bits(key: tuple[int, int], positions: list[int], tokens: list[int]) -> torch.Tensor:
    return random_bits(OPS, torch.tensor([key]), torch.tensor([positions]), torch.tensor(tokens))[0]


def sample(seed: int, positions: int, tokens: int) -> torch.Tensor:
    return gumbel(OPS, torch.tensor([key_of(seed)]), torch.arange(positions)[None], torch.arange(tokens))[0].double()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 2**20), st.integers(0, 2**18))
def test_the_integers_are_those_of_plain_python(seed, index, position, token):
    key = key_of(seed, index)
    word = int(bits(key, [position], [token])[0, 0]) & 0xFFFFFFFF
    assert word == slow.random_word(key, position, token)
    noise = gumbel(OPS, torch.tensor([key]), torch.tensor([[position]]), torch.tensor([token]))
    assert float(noise) == pytest.approx(slow.gumbel(key, position, token), abs=2e-6, rel=2e-6)


def test_known_values():
    """Fixed for good: another backend or version that gives other numbers gives other texts for the same seed."""
    assert mix_int(0) == 0
    assert mix_int(1) == 1753845952
    assert [key_of(0), key_of(1), key_of(2**63, 5)] == [
        (0, -1368424207),
        (1753845952, -2107964834),
        (-725982528, -233467190),
    ]
    assert (bits(key_of(42), [0, 7], [0, 1, 49151]).long() & 0xFFFFFFFF).tolist() == [
        [9826950, 126962082, 702723590],
        [4168831726, 4120390670, 364711794],
    ]


def test_the_hash_is_a_bijection_on_a_sample():
    words = {mix_int(x) for x in range(200_000)}
    assert len(words) == 200_000


def test_mean_variance_and_distribution():
    noise = sample(1, 64, 16_384).flatten()
    n = noise.numel()
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.sqrt(1.6449 / n)
    # Var of the sample variance is (kurtosis - 1) sigma^4 / n; the Gumbel kurtosis is 5.4.
    assert abs(float(noise.var()) - math.pi**2 / 6) < 5 * 1.6449 * math.sqrt(4.4 / n)
    ordered = torch.exp(-torch.exp(-noise)).sort().values  # its own distribution function makes it uniform
    rank = torch.arange(1, n + 1) / n
    distance = max(float((rank - ordered).max()), float((ordered - rank + 1 / n).max()))
    assert distance < 2.3 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 5e-5


@pytest.mark.parametrize("shift", [1, 2, 7, 64])
def test_neighbouring_positions_tokens_and_seeds_are_independent(shift):
    noise = sample(2, 256, 2048)
    limit = 5 / math.sqrt(noise[shift:].numel())

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert abs(correlation(noise[shift:], noise[:-shift])) < limit
    assert abs(correlation(noise[:, shift:], noise[:, :-shift])) < limit
    assert abs(correlation(noise, sample(2 + shift, 256, 2048))) < limit
    assert abs(correlation(noise, sample(2 + (shift << 32), 256, 2048))) < limit


def test_each_bit_is_fair_and_changes_half_of_the_time_when_one_input_bit_flips():
    tokens = list(range(4096))
    base = bits(key_of(3), [100], tokens)[0]
    for other in (
        bits(key_of(3), [101], tokens)[0],
        bits(key_of(2), [100], tokens)[0],
        bits(key_of(3), [100], [t ^ 1 for t in tokens])[0],
    ):
        for bit in range(32):
            assert abs(((base >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / 64
            assert abs((((base ^ other) >> bit) & 1).double().mean() - 0.5) < 6 * 0.5 / 64


def test_the_noise_is_finite_and_within_its_limits():
    noise = sample(4, 128, 8192)
    assert bool(torch.isfinite(noise).all())
    assert float(noise.min()) > -2.82
    assert float(noise.max()) < 22.9
    assert float(noise.max()) > 10  # the tail that decides an argmax is there: P(max < 10) = exp(-47)


def test_the_ends_of_the_range_of_words(monkeypatch):
    """Where rounding would reach u = 0 or u = 1, and infinite noise."""
    words = [0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, 0xFFFFFFFE, 0xFFFFFFFF]
    signed = torch.tensor(words).to(torch.int32)[None, None]
    monkeypatch.setattr(noise_module, "random_bits", lambda *_: signed)
    noise = gumbel(OPS, torch.tensor([[0, 0]]), torch.tensor([[0]]), torch.arange(len(words)))[0, 0]
    assert bool(torch.isfinite(noise).all())
    assert torch.equal(noise.sort(descending=True).values, noise), "small words make large noise"
    assert float(noise[0]) == pytest.approx(33 * math.log(2), abs=1e-4)
    assert float(noise[-1]) == pytest.approx(-math.log(24 * math.log(2)), abs=1e-4)
