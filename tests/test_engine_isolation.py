"""One request's trouble is its own; queues are bounded; nothing leaks."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine, EngineLoad, SamplingHistory
from redrafter.errors import InvalidRequest, Overloaded, RequestFailed
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.tiny import VOCAB, make_backend, run
from tests.traffic import Visit, play

TREE = DecodeConfig(beam_width=3, branching=3, draft_length=4, tree_size=12)
PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]
PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture
def backend() -> TorchBackend:
    return make_backend(context=120)


@pytest.mark.parametrize("error", [RuntimeError("out of\nwhatever"), IndexError("7"), ZeroDivisionError()])
def test_a_prompt_that_cannot_be_read_ends_its_request_only(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prefill = backend.target.prefill

    def broken(row: int, ids: Any, start: int) -> Any:
        if 66 in ids:
            raise error
        return prefill(row, ids, start)

    monkeypatch.setattr(backend.target, "prefill", broken)
    prompts = [PROMPT, [66, 66, 66], PROMPT[::-1]]
    answers = play(Engine(backend, TREE, max_batch=2), [Visit(i, None, p, PARAMS) for i, p in enumerate(prompts)])
    assert [a.reason for a in answers] == ["length", "error", "length"]
    failed = answers[1].events[-1].error
    assert isinstance(failed, RequestFailed) and type(error).__name__ in str(failed) and "\n" not in str(failed)
    for i in (0, 2):
        assert answers[i].ids == run(Engine(make_backend(), PLAIN), prompts[i], PARAMS)[0]


def test_settings_follow_their_requests(backend: TorchBackend) -> None:
    """Requests that leave move others to their rows; the last one that uses a setting takes its array along."""
    settings = [
        SamplingParams(max_new_tokens=6, temperature=0.7, seed=3, top_k=5),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=9, temperature=1.2, seed=8, logit_bias={7: 1.5}),
        SamplingParams(max_new_tokens=16, temperature=0.4, seed=1, frequency_penalty=0.5, logprobs=2),
        SamplingParams(max_new_tokens=20),
    ]
    engine, kinds = Engine(backend, TREE, max_batch=5), set()
    for i, params in enumerate(settings):
        engine.add(str(i), PROMPT[i:], params)
    while engine.has_work:
        engine.step()
        if engine._state is None:
            continue
        told = [SamplingHistory(r.params, r.prompt_ids, r.answer_ids) for r in engine._running]
        wanted, found = backend.sampling(told), engine._state.sampling
        flat = [(*s[:6], *(s.penalties or ()), s.keep_logits) for s in (wanted, found)]
        assert [x if x is None else torch.as_tensor(x).tolist() for x in flat[1]] == [
            x if x is None else torch.as_tensor(x).tolist() for x in flat[0]
        ]
        kinds.add(tuple(x is None for x in flat[0]))
    assert len(kinds) >= 3


def test_the_queue_is_bounded(backend: TorchBackend) -> None:
    engine = Engine(backend, TREE, max_batch=1, max_waiting=2)
    engine.add("a", PROMPT, PARAMS)
    engine.step()
    for name in "bc":
        engine.add(name, PROMPT, PARAMS)
    with pytest.raises(Overloaded, match="2 requests wait and the queue holds 2"):
        engine.add("d", PROMPT, PARAMS)
    with pytest.raises(InvalidRequest):  # what could never be served is told so, whatever the load
        engine.add("d", [], PARAMS)
    engine.cancel("b")
    engine.add("d", PROMPT, PARAMS)
    done = [e.request_id for _ in range(200) if engine.has_work for e in engine.step() if e.finish_reason]
    assert done == ["b", "a", "c", "d"]
    with pytest.raises(Overloaded):
        Engine(backend, TREE, max_waiting=0).add("a", PROMPT, PARAMS)


def test_the_clock_of_a_request(backend: TorchBackend) -> None:
    """It waits for the one before it, its prompt is read, its first token comes, it ends: in this order."""
    visits = [Visit(0, None, PROMPT, PARAMS), Visit(0, None, PROMPT[::-1], PARAMS)]
    first, second = (a.statistics for a in play(Engine(backend, TREE, max_batch=1), visits))
    assert 0 <= first.queue_seconds < first.seconds <= second.queue_seconds + 1e-3
    for s in (first, second):
        assert 0 < s.prefill_seconds < s.queue_seconds + s.prefill_seconds < s.first_token_seconds < s.seconds


def test_a_prompt_is_awaited_behind_the_launch_of_its_first_step(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has its next work before the host waits for what it is doing."""
    done: list[str] = []
    read, step = backend.prefill_chunks, backend.step
    backend.run_ahead = True
    monkeypatch.setattr(backend, "prefill_chunks", lambda *a: (done.append("prompt"), read(*a))[1])
    monkeypatch.setattr(backend, "mark", lambda: lambda: (time.sleep(0.02), done.append("awaited")))
    monkeypatch.setattr(backend, "step", lambda *a: (done.append("step"), step(*a))[1])
    engine = Engine(backend, PLAIN)
    engine.add("a", PROMPT, SamplingParams(max_new_tokens=2))
    engine.step()
    assert done == ["prompt", "step", "awaited"]
    events = [event for _ in range(3) for event in engine.step()]
    assert 0.02 <= events[-1].statistics.prefill_seconds < events[-1].statistics.first_token_seconds


@pytest.mark.parametrize("run_ahead", [False, True])
def test_all_are_cancelled_at_once(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, run_ahead: bool) -> None:
    backend.run_ahead = run_ahead
    engine = Engine(backend, TREE, max_batch=3, max_waiting=8)
    for i in range(6):
        engine.add(str(i), PROMPT[i:], PARAMS)
    for _ in range(3):
        engine.step()
    engine.cancel_all()
    engine.check()
    reasons = {e.request_id: e.finish_reason for e in engine.step()}
    assert reasons == {str(i): "cancelled" for i in range(6)} and not engine.has_work
    # It is also the way out after a step that failed.
    verify = backend.target.verify
    monkeypatch.setattr(backend.target, "verify", lambda *_: 1 / 0)
    engine.add("a", PROMPT, PARAMS)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.cancel_all()
    engine.check()
    monkeypatch.setattr(backend.target, "verify", verify)
    assert [e.finish_reason for e in engine.step()] == ["cancelled"]
    assert run(engine, PROMPT, PARAMS)[0] == run(Engine(make_backend(), PLAIN), PROMPT, PARAMS)[0]


def test_the_load_is_what_is_there(backend: TorchBackend) -> None:
    engine = Engine(backend, PLAIN, max_batch=2)
    assert engine.load == EngineLoad(0, 0, 0, 0, 0.0)
    for i in range(3):
        engine.add(str(i), PROMPT[i:], PARAMS)
    for _ in range(4):
        engine.step()
    load = engine.load
    # Both were read before the first step; each has its prompt but the root in the cache, and its steps.
    assert (load.running, load.waiting, load.parked_rows) == (2, 1, 0)
    assert load.slots_in_use == (len(PROMPT) - 1 + 4) + (len(PROMPT) - 2 + 4)
    assert load.cache_share == load.slots_in_use / (backend.rows * backend.slots)
    while engine.has_work:
        engine.step()
    assert engine.load == EngineLoad(0, 0, 0, 2, 0.0)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_five_hundred_cancels_leak_nothing(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, run_ahead: bool
) -> None:
    """In the queue, while the prompt is read, between any two steps; the engine's invariants hold after each."""
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 6)
    backend.run_ahead = run_ahead
    rng = random.Random(7)
    engine = Engine(backend, DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4), max_batch=4)
    alive: set[str] = set()
    ended: dict[str, str] = {}
    added = cancelled = 0
    while cancelled < 500:
        while len(alive) < 7:
            prompt = [rng.randrange(3, 9) for _ in range(rng.randint(1, 14))]
            engine.add(str(added), prompt, SamplingParams(max_new_tokens=rng.randint(1, 20)))
            alive.add(str(added))
            added += 1
        for event in engine.step():
            if event.finish_reason:
                assert event.request_id not in ended
                ended[event.request_id] = event.finish_reason
                alive.discard(event.request_id)
        for name in rng.sample(sorted(alive), min(len(alive), rng.randint(0, 4))):
            engine.cancel(name)
            alive.discard(name)
            cancelled += 1
        engine.check()
    while engine.has_work:
        ended |= {e.request_id: e.finish_reason for e in engine.step() if e.finish_reason}
        engine.check()
    assert len(ended) == added and sum(reason == "cancelled" for reason in ended.values()) == cancelled
    assert engine.load.running == engine.load.waiting == engine.load.slots_in_use == 0
    assert backend.rows == 4 and len(backend.held) <= 4
    text = [VOCAB - 1, 4, 5, 6]
    assert run(engine, text, PARAMS)[0] == run(Engine(make_backend(), PLAIN), text, PARAMS)[0]
