"""Shapes are timed at start-up, and an engine that adapts says what plain decoding says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from redrafter import shape
from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.load import known_shapes
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.policy import Adaptive, Candidate, Fixed, Timed
from redrafter.shape import time_shapes
from tests.tiny import make_backend, run_all

SMALL = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4)
PROMPTS = [[5, 17, 33, 8], [41, 12, 60]]
LARGE = DecodeConfig(beam_width=4, branching=4, draft_length=6, tree_size=24)


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend()


def with_times(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> None:
    """Step times by tree size, one per round."""
    rounds = {size: iter(times) for size, times in seconds.items()}
    monkeypatch.setattr(shape, "_one_step", lambda backend, config, length: next(rounds[config.tree_size]))


def test_the_median_counts_and_the_first_round_warms_up(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 1.0, 4: 1.2, 24: 3.0}
    with_times(monkeypatch, {size: [99.0, t, 50.0, t] for size, t in times.items()})
    timed = time_shapes(backend, [Candidate(SMALL, 2.0), Candidate(LARGE, 3.0)])
    assert timed == [Timed(PLAIN, 1.0, 1.0), Timed(SMALL, 2.0, 1.2), Timed(LARGE, 3.0, 3.0)]


@pytest.mark.parametrize(
    ("plain", "small", "large", "best"),
    [(1.0, 1.2, 3.0, SMALL), (1.0, 1.2, 1.5, LARGE), (1.0, 2.5, 4.0, PLAIN)],
)
def test_tokens_per_second_decide(plain: float, small: float, large: float, best: DecodeConfig) -> None:
    policy = Adaptive([Timed(PLAIN, 1.0, plain), Timed(SMALL, 2.0, small), Timed(LARGE, 3.0, large)])
    assert policy.shapes[0] == policy.choose(1) == best


def test_real_steps_are_timed(backend: TorchBackend) -> None:
    timed = time_shapes(backend, [Candidate(SMALL, 2.0), Candidate(LARGE, 3.0)], repeats=1)
    assert len(timed) == 3 and all(t.step_seconds > 0 for t in timed)


def test_an_engine_that_adapts_gives_the_ids_of_plain_decoding(backend: TorchBackend) -> None:
    """The random drafter accepts nothing, so the shapes change on the way."""
    policy = Adaptive([Timed(PLAIN, 1.0, 1.0), Timed(SMALL, 2.0, 1.2), Timed(LARGE, 3.0, 1.5)])
    engine = Engine(backend, policy, max_batch=2)
    params = [SamplingParams(max_new_tokens=60, ignore_eos=True)] * 2
    found = run_all(engine, PROMPTS, params)
    plain = run_all(engine.without_speculation(), PROMPTS, params)
    assert [ids for ids, _ in found] == [ids for ids, _ in plain]
    used = {line.config for line in policy.table() if line.rows == 2 and line.observed}
    assert used and sum(stats.drafted_steps for _, stats in found) > 0


class Listening(Fixed):
    def __init__(self, config: DecodeConfig) -> None:
        super().__init__(config)
        self.seconds: list[float] = []

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        self.seconds.append(seconds or 0.0)


def test_the_engine_tells_what_a_step_took(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may compute the step while it is asked for it, not while its outcome is read."""
    step = backend.step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.01)
        return step(*arguments)

    monkeypatch.setattr(backend, "step", slow)
    policy = Listening(SMALL)
    run_all(Engine(backend, policy), PROMPTS[:1], [SamplingParams(max_new_tokens=8, ignore_eos=True)])
    assert len(policy.seconds) > 2 and min(policy.seconds[1:]) >= 0.01


def test_shapes_come_from_the_drafters_figures() -> None:
    entry = {"beam_width": 4, "branching": 4, "draft_length": 6, "tree_size": 24, "tokens_per_step": 3.1}
    assert known_shapes({"tokens_per_step": [entry]}) == [Candidate(LARGE, 3.1)]
    assert known_shapes({}) == []
