"""The lookup's kernel against the algorithm's text, on texts short and long, and rows that begin before their text."""

from __future__ import annotations

import pytest
import torch

from redrafter.algorithm.beam import Reading
from redrafter.algorithm.lookup import UNKNOWN, find_chain
from redrafter.backends.torch.graph import IDLE
from tests.kernels.twins import OPS

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")
from redrafter.backends.torch.kernels import lookup

SLOTS, PAIRS = 2500, 5


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("alphabet", [2, 7, 3000])
def test_chains_are_the_algorithms(alphabet: int, length: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(alphabet + length)
    ends = [0, 1, 2, 40, 1023, 1030, 2300]
    text = torch.randint(alphabet, (len(ends) + 2, SLOTS), generator=generator)
    text[:, 0] = UNKNOWN
    counts = torch.tensor([1, 1, 1, 3, 5, 2, 4])
    first = torch.tensor(ends) - counts  # -1 where the text is one token
    tokens = torch.randint(alphabet, (len(ends), PAIRS), generator=generator)
    for row, count in enumerate(counts.tolist()):
        tokens[row, count:] = tokens[row, count - 1]
    reading = Reading(torch.zeros(len(ends), PAIRS, 1), tokens, first, counts)
    expected = text.clone()
    begin = first.clamp(min=0)
    expected[: len(ends)].scatter_(1, begin[:, None] + 1 + torch.arange(PAIRS), tokens)
    eager = find_chain(OPS, expected[: len(ends)], begin + counts, length)
    written = text.to(device)
    got = lookup.find_chain(Reading(*(x.to(device) for x in reading)), written, length)
    assert torch.equal(written.cpu(), expected)
    torch.testing.assert_close(got.weight.cpu(), eager.weight)
    assert torch.equal(got.tokens.cpu()[eager.weight > 0], eager.tokens[eager.weight > 0])
    assert (eager.weight > 0).any() or alphabet == 3000


def test_unknown_tokens_are_never_drafted(device: torch.device) -> None:
    text = torch.tensor([[UNKNOWN, 8, 5, 9, 7, UNKNOWN, UNKNOWN, 5, 1]])
    one = torch.ones(1, dtype=torch.int64)
    reading = Reading(torch.zeros(1, 1, 1), one[None] * 9, one * 7, one)
    eager = find_chain(OPS, torch.cat([text[:, :8], one[None] * 9], 1), one * 8, 4)
    got = lookup.find_chain(Reading(*(x.to(device) for x in reading)), text.to(device), 4)
    assert got.tokens.tolist() == eager.tokens.tolist() == [[7, 0, 0, 5]]
    torch.testing.assert_close(got.weight.cpu(), eager.weight)


def test_a_row_that_was_just_left_drafts_nothing(device: torch.device) -> None:
    """Its reading is still its last answer's end, which stands at the text's end, too, with nothing behind it."""
    text = torch.tensor([[UNKNOWN, 8, 5, 9, 7, *[UNKNOWN] * 15]], device=device)
    tokens, one = torch.tensor([[9, 7, 7]], device=device), torch.ones(1, dtype=torch.int64, device=device)
    chain = lookup.find_chain(Reading(torch.zeros(1, 3, 1, device=device), tokens, one * IDLE, one * 2), text, 3)
    assert chain.weight.tolist() == [[0, 0, 0]] and int(chain.tokens.min()) >= 0


def test_an_idle_row_writes_behind_all_texts(device: torch.device) -> None:
    text = torch.full((2, 40), UNKNOWN, device=device)
    one = torch.ones(2, dtype=torch.int64, device=device)
    tokens = torch.tensor([[3, 3, 3], [4, 4, 4]], device=device)
    reading = Reading(torch.zeros(2, 3, 1, device=device), tokens, torch.tensor([IDLE, 6], device=device), one)
    lookup.find_chain(reading, text, 2)
    assert text[0].tolist() == [UNKNOWN] * 37 + [3] * 3
    assert text[1].tolist() == [UNKNOWN] * 7 + [4] * 3 + [UNKNOWN] * 30
