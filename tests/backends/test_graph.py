"""Graphs serve fewer rows than they were recorded for; what comes out equals the step that they record."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.sampling import Penalties, Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.graph import IDLE, GraphRunner, copy_into, leaves, mapped, serves, size_for
from redrafter.params import PLAIN, DecodeConfig

SHAPE = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4)
SLOTS, SIZES = 40, [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@pytest.mark.parametrize("rows", range(1, 65))
def test_the_next_size_serves(rows: int) -> None:
    size = size_for(rows, 64)
    assert size == min(s for s in SIZES if s >= rows) and serves(size, rows)
    assert [s for s in range(1, 100) if serves(s, rows)] == [s for s in range(rows, 100) if s == rows or s < 1.5 * rows]


@pytest.mark.parametrize(("rows", "most", "size"), [(3, 3, 3), (3, 4, 4), (9, 10, 10), (7, 0, 7), (25, 31, 31)])
def test_a_graph_has_no_more_rows_than_the_caches(rows: int, most: int, size: int) -> None:
    assert size_for(rows, most) == size


class Toy:
    """A step whose outcome hangs on all of a row's text and settings, and on no other row; an idle row stays idle."""

    def __init__(self, rows: int) -> None:
        self.cache = torch.zeros(rows, SLOTS, dtype=torch.int64)
        self.ran: set[int] = set()

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree, Any]:
        rows = state.root.shape[0]
        self.ran.add(rows)
        slot_B = torch.where(state.lengths < 0, SLOTS - 1, state.lengths)
        self.cache[:rows].scatter_(1, slot_B[:, None], state.root[:, None])
        text_BS = self.cache[:rows] * (torch.arange(SLOTS) <= state.lengths[:, None])
        total_B = (text_BS * torch.arange(1, SLOTS + 1)).sum(1)
        if config.speculative:
            total_B = total_B + state.reading.tokens.sum(1) + state.reading.first
        penalties = state.sampling.penalties
        if penalties is not None:
            total_B = total_B + penalties.answer.sum(1).long()
            penalties = penalties._replace(answer=penalties.answer + 1)
        tokens_BL = (total_B[:, None] + torch.arange(SHAPE.draft_length + 1)) % 89
        one_B = torch.ones_like(total_B)
        reading = Reading(tokens_BL[:, :, None].float(), tokens_BL, state.lengths + 0, one_B)
        lengths = torch.where(state.lengths == IDLE, IDLE, state.lengths + 1)
        after = DecodeState(reading, tokens_BL[:, 0], lengths, state.sampling._replace(penalties=penalties))
        accepted = Accepted(tokens_BL, one_B, tokens_BL[:, 0], tokens_BL, one_B > 0)
        return after, accepted, TokenTree(*[one_B[:, None]] * 5), (tokens_BL + 1, None)


def rerun(function: Any) -> Any:
    """Stands in for CUDA's recorder."""
    results = function()
    return (lambda: copy_into(results, function())), results


def start(root: int, penalised: bool) -> DecodeState:
    one = torch.ones(1, dtype=torch.int64)
    tokens = one[:, None].expand(1, SHAPE.draft_length + 1) * root
    penalties = Penalties(*[one.float()] * 3, *[torch.full((1, 5), float(root))] * 2)
    sampling = Sampling(penalties=penalties if penalised else None)
    return DecodeState(Reading(tokens[:, :, None].float(), tokens, one - 1, one), one * root, one - 1, sampling)


def stack(a: DecodeState, b: DecodeState) -> DecodeState:
    more = leaves(b)
    return mapped(lambda x: torch.cat([x, next(more)]), a)


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize(("most", "sizes"), [(5, {1, 2, 4, 5}), (8, {1, 2, 4, 6, 8})])
def test_rows_that_come_and_go_get_what_each_gets_alone(most: int, sizes: set[int], penalised: bool) -> None:
    """The slow twin: every request steps in a cache of its own. Rows past the running ones hold what others left."""
    rng = random.Random(most)
    toy = Toy(most)
    runner = GraphRunner(toy.step, rerun, lambda: most)
    alone: list[tuple[Toy, DecodeState]] = []
    state: DecodeState | None = None
    for turn in range(300):
        if len(alone) < most and (state is None or rng.random() < 0.5):
            new = start(rng.randrange(1, 80), penalised)
            state = new if state is None else stack(state, new)
            alone.append((Toy(1), new))
        assert state is not None
        config = PLAIN if turn % 4 == 0 else SHAPE
        beyond = toy.cache[len(alone) :, : SLOTS - 1].clone()
        view = runner(state, config)
        steps = [(twin, *twin.step(row, config)) for twin, row in alone]
        assert view.accepted.tokens.tolist() == [accepted.tokens[0].tolist() for _, _, accepted, *_ in steps]
        assert torch.equal(view.told[0], view.accepted.tokens + 1)
        assert torch.equal(toy.cache[len(alone) :, : SLOTS - 1], beyond), "an idle row wrote into a text"
        state, alone = view.after, [(twin, after) for twin, after, *_ in steps]
        stay = [i for i in range(len(alone)) if rng.random() > 0.15 and int(state.lengths[i]) < SLOTS - 2]
        if len(stay) < len(alone):
            toy.cache[: len(stay)] = toy.cache[stay]
            state = mapped(lambda x, stay=stay: x[stay], state) if stay else None
            alone = [alone[i] for i in stay]
    assert toy.ran == sizes
    assert len(runner) == 2 * len(sizes), "one of every size, with and without drafting"
