"""Shapes are timed at start-up, and an engine that adapts says what plain decoding says."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import pytest

from redrafter import shape
from redrafter.backends.torch.graph import serves, size_for
from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.load import known_shapes
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.policy import Adaptive, Candidate, Fixed, Timed, bucket_of
from redrafter.shape import time_shapes
from tests.tiny import make_backend, run_all

SMALL = DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4)
PROMPTS = [[5, 17, 33, 8], [41, 12, 60]]
LARGE = DecodeConfig(beam_width=4, branching=4, draft_length=6, tree_size=24)


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend()


def shipped_shapes() -> list[Candidate]:
    folder = files("redrafter") / "assets" / "smollm2-135m-instruct"
    return known_shapes(json.loads((folder / "config.json").read_text())["metadata"])


def with_times(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> None:
    """Step times by tree size, one per round."""
    rounds = {size: iter(times) for size, times in seconds.items()}
    monkeypatch.setattr(shape, "_step_seconds", lambda backend, config, *_, **__: next(rounds[config.tree_size]))


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


class Recording(TorchBackend):
    """As if its steps were recorded."""

    graphs = 0  # type: ignore[assignment]


@pytest.fixture
def recording(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    monkeypatch.setattr(backend, "__class__", Recording)
    return backend


@pytest.mark.parametrize(
    ("most", "rows"),
    [(1, [1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 4]), (5, [1, 4, 5]), (8, [1, 4, 8]), (32, [1, 4, 8, 16, 32])],
)
def test_recorded_steps_are_timed_for_more_rows(
    recording: TorchBackend, monkeypatch: pytest.MonkeyPatch, most: int, rows: list[int]
) -> None:
    seen: Counter[tuple[int, DecodeConfig]] = Counter()

    def one_step(backend: Any, config: DecodeConfig, length: int, rows: int, steps: int) -> float:
        seen[rows, config] += 1
        return 1.0 + 0.01 * max(0, rows * config.tree_size - 64)

    monkeypatch.setattr(shape, "_step_seconds", one_step)
    monkeypatch.setattr(recording, "reserve", lambda *_: None)
    shapes = shipped_shapes()
    timed = time_shapes(recording, shapes, most)
    everything = {PLAIN, *(c.config for c in shapes)}
    assert sorted({t.rows for t in timed}) == rows and len(everything) == 10
    for count in rows:
        chosen = {t.config for t in timed if t.rows == count}
        assert PLAIN in chosen and len(chosen) == (10 if count == 1 else 1 + shape.PROMISING)
        assert sum(n for (at, _), n in seen.items() if at == count) == 4 * (10 if count == 1 else 7)
    assert seen.items() >= {(t.rows, t.config): 4 for t in timed}.items()
    largest = max(everything, key=lambda c: c.tree_size)
    assert largest not in {t.config for t in timed if t.rows == 32}, "it does not pay for so many rows"
    policy = Adaptive(timed)
    lines = [line for line in policy.table() if line.observed]
    assert {(line.rows, line.config, line.step_seconds) for line in lines} == {
        (bucket_of(t.rows), t.config, t.step_seconds) for t in timed
    }


MILLISECONDS = {
    1: [0.43, 0.62, 0.63, 0.65, 0.67, 0.69, 0.72, 0.75, 0.76, 0.80],
    4: [0.52, 0.64, 0.65, 0.69, 0.71, 0.73, 0.93, 0.98, 1.05, 1.20],
    8: [0.58, 0.65, 0.67, 0.73, 0.95, 0.99, 1.12, 1.20, 1.42, 1.70],
    16: [0.63, 0.69, 0.72, 0.97, 1.17, 1.22, 1.45, 1.65, 2.10, 2.60],
    32: [0.65, 0.73, 0.98, 1.23, 1.36, 1.43, 1.90, 2.30, 3.20, 4.10],
}
"""Steps of SmolLM2-135M on one H200 by rows, for 1, 2, 4, 8, 12, 16, 24, 32, 48 and 64 nodes; up to 16 nodes as
measured, the others about so."""


def test_what_pays_on_easy_text_is_offered_and_what_pays_on_hard_text(
    recording: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [Candidate(PLAIN, 1.0), *shipped_shapes()]
    order = [c.config for c in shapes]

    def one_step(backend: Any, config: DecodeConfig, length: int, rows: int, steps: int) -> float:
        return MILLISECONDS[rows][order.index(config)] / 1e3

    monkeypatch.setattr(shape, "_step_seconds", one_step)
    monkeypatch.setattr(recording, "reserve", lambda *_: None)
    timed = time_shapes(recording, shapes[1:], 32)
    assert len(timed) == 26
    for rows in (4, 8, 16, 32):
        kept = {order.index(t.config) for t in timed if t.rows == rows}
        for share in (1.0, 0.5):
            rates = [(1 + share * (c.tokens_per_step - 1)) / MILLISECONDS[rows][i] for i, c in enumerate(shapes)]
            assert max(rates[i] for i in kept) > 0.97 * max(rates), (rows, share)


@pytest.mark.parametrize("most", [1, 5, 32])
def test_all_that_may_be_chosen_is_recorded_ahead(
    recording: TorchBackend, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """In both ways, for whatever number of rows a graph serves."""
    graphs: dict[tuple[DecodeConfig, float], list[int]] = {}

    def one_step(
        backend: Any, config: DecodeConfig, length: int, rows: int, temperature: float = 0.0, steps: int = 1
    ) -> float:
        known = graphs.setdefault((config, temperature), [])
        if not any(serves(size, rows) for size in known):
            known.append(size_for(rows, most))
        return 1.0 + 0.01 * max(0, rows * config.tree_size - 64)

    monkeypatch.setattr(shape, "_step_seconds", one_step)
    monkeypatch.setattr(recording, "reserve", lambda *_: None)
    policy = shape.adaptive(recording, shipped_shapes(), most)
    before = sum(map(len, graphs.values()))
    for rows in range(1, most + 1):
        for index in policy.offered(bucket_of(rows)):
            for temperature in (0.0, 1.0):
                one_step(recording, policy.shapes[index], 0, rows, temperature)
    assert sum(map(len, graphs.values())) == before
    assert len(policy.offered(1)) == 10
    assert all(len(policy.offered(bucket_of(n))) == 1 + shape.PROMISING for n in range(2, most + 1))


def test_a_real_sampled_step_is_taken_ahead(recording: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    step = recording.step

    def watched(state: Any, config: DecodeConfig) -> Any:
        seen.add((state.root.shape[0], config, state.sampling.inverse_temperature is not None))
        return step(state, config)

    monkeypatch.setattr(recording, "step", watched)
    shape.adaptive(recording, [Candidate(SMALL, 2.0)], 2)
    assert seen == {
        (rows, config, sampled) for rows in (1, 2) for config in (PLAIN, SMALL) for sampled in (False, True)
    }


def test_every_change_of_shape_is_made_ahead(recording: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first shape to each other one: one that reads less at once has the drafter catch up."""
    seen, caught_up = [], []
    step, catch_up = recording.step, recording.catch_up

    def watched(state: Any, config: DecodeConfig) -> Any:
        seen.append(config)
        return step(state, config)

    def watched_catch_up(reading: Any) -> None:
        caught_up.append(reading.tokens.shape[1])
        catch_up(reading)

    monkeypatch.setattr(recording, "step", watched)
    monkeypatch.setattr(recording, "catch_up", watched_catch_up)
    monkeypatch.setattr(shape, "_step_seconds", lambda *_, **__: 1.0)
    policy = shape.adaptive(recording, [Candidate(SMALL, 2.0), Candidate(LARGE, 3.0)])
    assert policy.shapes[0] == LARGE
    assert seen == [LARGE, SMALL, LARGE, PLAIN]
    assert caught_up == [LARGE.deepest + 1]


def test_a_time_taken_ahead_of_the_outcome_is_that_of_one_step(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps are launched before the outcome of the one before is read: of five in a row four count."""
    monkeypatch.setattr(backend, "run_ahead", True)
    read, reads, steps = backend.read, [], []
    step = backend.step
    monkeypatch.setattr(backend, "step", lambda *args: (steps.append(len(reads)), step(*args))[1])
    monkeypatch.setattr(backend, "read", lambda handle: (reads.append(0), read(handle))[1])
    monkeypatch.setattr(shape.time, "perf_counter", lambda: float(8 * len(reads)))
    backend.reserve(1, 300)
    assert shape._step_seconds(backend, SMALL, 10, 1, steps=shape._steps_at_once(backend)) == 8.0
    assert steps == [0, 0, 1, 2, 3] and len(reads) == 5


def test_without_recording_one_row_is_enough(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "_step_seconds", lambda *_, **__: 1.0)
    assert {t.rows for t in time_shapes(backend, [Candidate(SMALL, 2.0)], 32)} == {1}


def test_real_steps_of_more_rows_are_timed(recording: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = recording.step

    def watched(state: Any, config: DecodeConfig) -> Any:
        seen.append((state.root.tolist(), state.lengths.tolist(), config))
        return step(state, config)

    monkeypatch.setattr(recording, "step", watched)
    timed = time_shapes(recording, [Candidate(SMALL, 2.0)], 4, repeats=1)
    assert [(t.config, t.rows) for t in timed] == [(PLAIN, 1), (SMALL, 1), (PLAIN, 4), (SMALL, 4)]
    assert all(t.step_seconds > 0 for t in timed)
    assert ([1] * 4, [shape.PROBE_TOKENS] * 4, SMALL) in seen
    assert {len(roots) for roots, *_ in seen} == {1, 4} and len(seen) == 2 * 2 * 4


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


class Changing(Fixed):
    def __init__(self, turns: Sequence[DecodeConfig]) -> None:
        super().__init__(SMALL)
        self.shapes, self._next = (SMALL, LARGE), iter(turns)
        self.told: list[bool] = []

    def choose(self, rows: int) -> DecodeConfig:
        return next(self._next)

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        self.told.append(seconds is not None)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_step_in_flight_while_another_shape_is_launched_teaches_no_time(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    """The host reads its outcome late: what the change takes it to launch comes first. So does a prompt."""
    monkeypatch.setattr(backend, "run_ahead", run_ahead)
    turns = [SMALL, SMALL, LARGE, LARGE, LARGE, SMALL, SMALL, SMALL]
    policy = Changing([*turns, *[SMALL] * 40])
    engine = Engine(backend, policy, 2)
    engine.add("first", PROMPTS[0], SamplingParams(max_new_tokens=30, ignore_eos=True))
    while len(policy.told) < 8:
        engine.step()
    engine.add("second", PROMPTS[1], SamplingParams(max_new_tokens=20, ignore_eos=True))
    while len(policy.told) < 11:
        engine.step()
    engine.cancel_all()
    if run_ahead:  # the step after a change begins later too: that the policy knows
        expected = [False, False, True, True, False, True, True, True, False, False, True]
    else:
        expected = [False, *[True] * 7, False, True, True]
    assert policy.told == expected


def test_shapes_come_from_the_drafters_figures() -> None:
    entry = {"beam_width": 4, "branching": 4, "draft_length": 6, "tree_size": 24, "tokens_per_step": 3.1}
    assert known_shapes({"tokens_per_step": [entry]}) == [Candidate(LARGE, 3.1)]
    assert known_shapes({}) == []
