"""The control for forks: steps of the speculative shape that accept nothing drafted answer as plain steps do."""

from __future__ import annotations

import pytest

from redrafter.backends.base import STAGES
from redrafter.bench.control import accepting_nothing, usual_shape
from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig
from redrafter.policy import Adaptive, Fixed, Timed
from tests.tiny import make_backend
from tests.traffic import play, random_visits

SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=8)


@pytest.mark.parametrize("seed", [1, 2])
def test_trees_of_which_nothing_is_accepted_answer_as_plain_decoding(seed: int) -> None:
    """All settings, penalties and noise too; requests come, leave and are cancelled."""
    visits = random_visits(seed, 8, longest=12)
    backend = make_backend()
    plain = play(Engine(backend, PLAIN, 3), visits)
    drafted = play(Engine(backend, SHAPE, 3), visits)
    with accepting_nothing(backend):
        control = play(Engine(backend, SHAPE, 3), visits)
    assert backend.stages == STAGES
    whole = [i for i, visit in enumerate(visits) if visit.cancelled is None]
    assert len(whole) > 4 and [control[i].ids for i in whole] == [plain[i].ids for i in whole]
    counts = [control[i].statistics for i in whole]
    assert sum(sum(answer.statistics.accepted_at_depth) for answer in drafted) > 0, "there was something to cut"
    assert not any(any(c.accepted_at_depth) for c in counts)
    # The steps are the size of speculation and as many as plain decoding takes.
    assert all(c.drafted_steps == c.steps == plain[i].statistics.steps for i, c in zip(whole, counts, strict=True))
    assert all(c.tree_nodes == c.steps * SHAPE.tree_size for c in counts)


def test_the_stages_are_back_after_an_error() -> None:
    backend = make_backend()
    with pytest.raises(KeyboardInterrupt), accepting_nothing(backend):
        assert backend.stages != STAGES
        raise KeyboardInterrupt
    assert backend.stages == STAGES


def test_the_usual_shape_is_the_one_that_most_steps_had() -> None:
    small = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4)
    policy = Adaptive([Timed(PLAIN, 1.0, 0.9), Timed(SHAPE, 3.0, 1.0), Timed(small, 2.0, 1.0)])
    assert usual_shape(policy) == SHAPE, "the first one while nothing was seen"
    for shape in (SHAPE, *[small] * 5, *[PLAIN] * 9):
        policy.observe(shape, [1], 1.0)
    assert usual_shape(policy) == small
    assert usual_shape(Fixed(SHAPE)) == SHAPE and usual_shape(Fixed(PLAIN)) is None
