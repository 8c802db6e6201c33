"""What is looked up, against loops over Python lists; and how it mixes into the children's weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redrafter.algorithm.lookup import DOUBT, LEAST, MOST, UNKNOWN, Chain, find_chain, mixed
from redrafter.backends.torch.ops import TorchOps

OPS = TorchOps()


def slow_chain(text: list[int], length: int) -> tuple[list[int], list[float]]:
    """Tokens and weights; without an earlier occurrence all weights are 0 and the tokens mean nothing."""
    end = len(text) - 1
    found, most = -1, 0
    for place in range(end):
        equal = 0
        while equal < min(MOST, place + 1) and text[place - equal] == text[end - equal]:
            equal += 1
        if equal >= max(LEAST, most):
            found, most = place, equal
    if found < 0:
        return [], [0.0] * length
    known = list(text)
    while len(known) < found + 1 + length:  # what is not there yet repeats what leads to it
        known.append(known[len(known) - (end - found)])
    sure = [most + i for i in range(length)]
    return known[found + 1 : found + 1 + length], [n / (n + DOUBT) for n in sure]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=3), st.integers(1, 9))
def test_the_latest_of_the_longest_earlier_occurrences(texts: list[list[int]], length: int) -> None:
    rows = torch.full((len(texts), 50), UNKNOWN)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
        row[len(text) :] = 1  # an older text's tokens lie behind the end: they are not looked at
    chain = find_chain(OPS, rows, torch.tensor([len(text) - 1 for text in texts]), length)
    for row, text in enumerate(texts):
        tokens, weights = slow_chain(text, length)
        assert chain.weight[row].tolist() == pytest.approx(weights)
        assert not tokens or chain.tokens[row].tolist() == tokens


def test_a_token_that_was_not_read_equals_none_that_was() -> None:
    text = torch.tensor([[UNKNOWN, 5, 9, 3, 5, 9]])
    expected = pytest.approx([2 / (2 + DOUBT), 3 / (3 + DOUBT)])
    assert find_chain(OPS, text, torch.tensor([5]), 2).weight[0].tolist() == expected
    text[0, 1] = UNKNOWN
    assert find_chain(OPS, text, torch.tensor([5]), 2).weight[0].tolist() == [0, 0]


def test_what_leads_to_where_nothing_was_read_is_a_token_that_nobody_follows() -> None:
    """As in a row that nobody runs in: its last text, then nothing, then what it makes up."""
    text = torch.tensor([[UNKNOWN, 8, 5, 9, 7, UNKNOWN, UNKNOWN, 5, 9]])
    chain = find_chain(OPS, text, torch.tensor([8]), 4)
    assert chain.tokens.tolist() == [[7, 0, 0, 5]]
    assert chain.weight[0].tolist() == pytest.approx([2 / (2 + DOUBT), 0, 0, 0])


def mix(guess: int, share: float, follows: list[bool]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two beams of three children with weights 0.6, 0.3 and 0.1."""
    token = torch.tensor([[[4, 7, 2], [4, 7, 2]]])
    weight = torch.tensor([[[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]]).log()
    chain = Chain(torch.tensor([[0, guess]]), torch.tensor([[0.9, share]]))
    token, weight, hit = mixed(OPS, chain, 2, torch.tensor([follows]), token, weight)
    return token[0], weight[0].exp(), hit[0]


def test_a_beam_that_follows_gives_the_chain_its_share() -> None:
    token, weight, hit = mix(7, 0.5, [True, False])
    assert token.tolist() == [[4, 7, 2], [4, 7, 2]]
    torch.testing.assert_close(weight, torch.tensor([[0.3, 0.65, 0.05], [0.6, 0.3, 0.1]]))
    assert hit.tolist() == [[False, True, False], [False, False, False]]


def test_a_token_that_is_no_child_replaces_the_last_one_if_it_outweighs_it() -> None:
    token, weight, hit = mix(9, 0.5, [True, False])
    assert token.tolist() == [[4, 7, 9], [4, 7, 2]]
    torch.testing.assert_close(weight, torch.tensor([[0.3, 0.15, 0.5], [0.6, 0.3, 0.1]]))
    assert hit[0].tolist() == [False, False, True]
    token, _, hit = mix(9, 0.05, [True, False])
    assert token.tolist() == [[4, 7, 2], [4, 7, 2]] and not hit.any()


def test_nothing_found_changes_nothing() -> None:
    token, weight, hit = mix(7, 0.0, [True, True])
    assert token.tolist() == [[4, 7, 2], [4, 7, 2]] and not hit.any()
    torch.testing.assert_close(weight, torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]))
