"""Where a step's nodes go and the state it leaves, one launch each, against the lines that they stand for."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.algorithm.step import advance as twin
from redrafter.backends.torch.graph import IDLE, STOPS, Ends
from redrafter.backends.torch.kernels.state import advance, place_nodes
from redrafter.backends.torch.ops import TorchOps


@pytest.mark.parametrize("nodes", [1, 7, 64])
def test_nodes_lie_behind_their_texts_and_those_of_idle_rows_behind_all(device: torch.device, nodes: int) -> None:
    lengths_B = torch.tensor([5, IDLE, 0], device=device)
    depth_BN = torch.randint(0, 5, (3, nodes), device=device)
    words = torch.randint(-(2**62), 2**62, (3, nodes, 2), device=device)
    slots, positions, mask = place_nodes(depth_BN, words, lengths_B, 200)
    for row, (first, length) in enumerate(((5, 5), (200 - nodes, 0), (0, 0))):
        assert slots[row].tolist() == list(range(first, first + nodes))
        assert torch.equal(positions[row], length + depth_BN[row])
        assert torch.equal(mask[row, 0, :, :2], words[row])
        assert mask[row, 0, :, 2].tolist() == [length] * nodes


@pytest.mark.parametrize(("depths", "width"), [(1, 48), (4, 48), (3, 5000)])
def test_the_state_is_the_algorithms_and_idle_rows_stay_idle(device: torch.device, depths: int, width: int) -> None:
    rows, nodes = 3, 9
    whole = torch.randn(rows, nodes, width + 8, device=device)
    features = whole[:, :, :width]
    path = torch.randint(0, nodes, (rows, depths), device=device)
    tokens = torch.randint(0, 99, (rows, depths), device=device)
    length = torch.tensor([0, depths - 1, 0], device=device)
    accepted = Accepted(path, length, tokens[:, 0], tokens, length == length)
    lengths = torch.tensor([12, 3, IDLE], device=device)
    state = DecodeState(Reading(whole, tokens, lengths, length), tokens[:, 0], lengths, Sampling())
    expected = twin(TorchOps(), state, features, accepted)
    found = advance(features, accepted, lengths)
    assert torch.equal(found.features, expected.reading.features)
    assert torch.equal(found.pairs, expected.reading.count)
    assert torch.equal(found.first, expected.reading.first)
    assert torch.equal(found.lengths[:2], expected.lengths[:2]) and found.lengths[2] == IDLE


@pytest.mark.parametrize("depths", [1, 3, 6])
def test_a_row_that_ended_is_idle(device: torch.device, depths: int) -> None:
    """By a token that ends it, accepted or the bonus, or because its answer is full; the others go on."""
    rows = 64
    tokens = torch.randint(0, 12, (rows, depths), device=device)
    length = torch.randint(0, depths, (rows,), device=device)
    stops = torch.cat([torch.randint(0, 40, (rows, 2), device=device), torch.full((rows, STOPS - 2), -1)], 1)
    before, full = torch.randint(1, 9, (rows,), device=device), torch.randint(6, 20, (rows,), device=device)
    before[::7] = IDLE
    path = torch.zeros_like(tokens)
    accepted = Accepted(path, length, tokens[:, -1], tokens, length == length)
    found = advance(torch.randn(rows, 2, 16, device=device), accepted, before, Ends(stops, full))
    after = before + 1 + length
    ended = (tokens[:, :, None] == stops[:, None]).any(2).any(1) | (after >= full)
    expected = torch.where((before == IDLE) | ended, IDLE, after)
    assert torch.equal(found.lengths, expected)
    assert {IDLE} < set(found.lengths.tolist()), "some end, some do not"
    assert torch.equal(found.first, before) and torch.equal(found.pairs, length + 1)
