"""The program picks the shape with the most tokens per second, and plain decoding when nothing beats it."""

from __future__ import annotations

import pytest

from redrafter import shape
from redrafter.backends.torch.load import TorchBackend
from redrafter.load import known_shapes
from redrafter.params import PLAIN, DecodeConfig
from redrafter.shape import Candidate, pick_shape
from tests.tiny import make_backend

SMALL = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4)
LARGE = DecodeConfig(beam_width=4, branching=4, draft_length=6, tree_size=24)


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend()


def with_times(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> None:
    """Step times by tree size, one per round."""
    rounds = {size: iter(times) for size, times in seconds.items()}
    monkeypatch.setattr(shape, "_one_step", lambda backend, config, length: next(rounds[config.tree_size]))


@pytest.mark.parametrize(
    ("plain", "small", "large", "best"),
    [(1.0, 1.2, 3.0, SMALL), (1.0, 1.2, 1.5, LARGE), (1.0, 2.5, 4.0, PLAIN)],
)
def test_tokens_per_second_decide(
    backend: TorchBackend,
    monkeypatch: pytest.MonkeyPatch,
    plain: float,
    small: float,
    large: float,
    best: DecodeConfig,
) -> None:
    # The first round warms up and one of three is an outlier: neither may count.
    times = {1: plain, 4: small, 24: large}
    with_times(monkeypatch, {size: [99.0, t, 50.0, t] for size, t in times.items()})
    ranked = pick_shape(backend, [Candidate(SMALL, 2.0), Candidate(LARGE, 3.0)])
    assert ranked[0].config == best
    assert [t.tokens_per_second for t in ranked] == sorted((t.tokens_per_second for t in ranked), reverse=True)


def test_real_steps_are_timed(backend: TorchBackend) -> None:
    ranked = pick_shape(backend, [Candidate(SMALL, 2.0), Candidate(LARGE, 3.0)], repeats=1)
    assert len(ranked) == 3 and all(t.step_seconds > 0 for t in ranked)


def test_shapes_come_from_the_drafters_figures() -> None:
    entry = {"beam_width": 4, "branching": 4, "draft_length": 6, "tree_size": 24, "tokens_per_step": 3.1}
    assert known_shapes({"tokens_per_step": [entry]}) == [Candidate(LARGE, 3.1)]
    assert known_shapes({}) == []
