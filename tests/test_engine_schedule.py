"""The engine's schedule: steps launched ahead, shapes that change, prompts read beside running requests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from redrafter.backends.protocol import PromptPart
from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.requests import Request
from tests.tiny import VOCAB, ScriptedDrafter, make_backend, run, run_all, set_drafter
from tests.traffic import Answer, Visit, play, random_visits

TREE = DecodeConfig(beam_width=3, branching=3, draft_length=4, tree_size=12)
SHAPES = (
    TREE,
    PLAIN,
    DecodeConfig(beam_width=2, branching=2, draft_length=7, tree_size=9),
    DecodeConfig(beam_width=4, branching=4, draft_length=1, tree_size=4),
)
PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]


class Scripted:
    """Takes the shapes of a list in turn, the last one for ever; remembers what it was told."""

    def __init__(self, shapes: Sequence[DecodeConfig], order: Iterator[DecodeConfig]) -> None:
        self.shapes = tuple(shapes)
        self._order = order
        self.seen: list[tuple[DecodeConfig, list[int], float | None]] = []
        self.rows: list[int] = []

    def choose(self, rows: int) -> DecodeConfig:
        self.rows.append(rows)
        return next(self._order)

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        self.seen.append((config, list(accepted), seconds))


def at_random(seed: int) -> Scripted:
    rng = random.Random(seed)
    return Scripted(SHAPES, iter(lambda: rng.choice(SHAPES), None))


def plain_first(steps: int) -> Scripted:
    return Scripted((TREE, PLAIN), iter([PLAIN] * steps + [TREE] * 500))


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return make_backend(context=240)


@pytest.fixture
def ahead(backend: TorchBackend) -> Iterator[TorchBackend]:
    backend.run_ahead = True
    yield backend
    backend.run_ahead = False


def alone(backend: TorchBackend, visits: Sequence[Visit]) -> list[list[int]]:
    """The plain answers, one request at a time. ``run`` leaves nothing in flight."""
    return [run(Engine(backend, PLAIN, prefix_reuse=False), v.prompt, v.params)[0] for v in visits]


def assert_equal(visits: Sequence[Visit], answers: Sequence[Answer], expected: Sequence[list[int]]) -> None:
    for visit, answer, ids in zip(visits, answers, expected, strict=True):
        if answer.reason == "cancelled":
            assert visit.cancelled is not None and answer.ids == ids[: len(answer.ids)]
        else:
            assert answer.ids == ids


@pytest.mark.parametrize("config", [TREE, PLAIN], ids=["tree", "plain"])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_ahead_gives_the_same_answers_reasons_and_statistics(
    ahead: TorchBackend, config: DecodeConfig, seed: int
) -> None:
    visits = random_visits(seed, 12)
    late = play(Engine(ahead, config, max_batch=4, prefix_reuse=False), visits)
    ahead.run_ahead = False
    now = play(Engine(ahead, config, max_batch=4, prefix_reuse=False), visits)
    assert_equal(visits, late, alone(ahead, visits))
    assert_equal(visits, now, alone(ahead, visits))
    for visit, a, b in zip(visits, late, now, strict=True):
        if visit.cancelled is None:
            assert (a.ids, a.reason, a.counts) == (b.ids, b.reason, b.counts)


def test_a_step_ahead_is_launched_before_the_last_is_read(ahead: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    step, read = ahead.step, ahead.read
    monkeypatch.setattr(ahead, "step", lambda *a: (done.append("step"), step(*a))[1])
    monkeypatch.setattr(ahead, "read", lambda *a: (done.append("read"), read(*a))[1])
    engine = Engine(ahead, PLAIN)
    engine.add("a", PROMPT, SamplingParams(max_new_tokens=4))
    while engine.has_work:
        engine.step()
    # The fourth step surely ends the request: no fifth is launched for nothing.
    assert done == ["step", "step", "read", "step", "read", "step", "read", "read"]


def test_no_step_is_launched_behind_one_that_is_likely_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend(context=90)
    params = SamplingParams(max_new_tokens=20)
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params)
    set_drafter(backend, ScriptedDrafter(PROMPT + plain))
    backend.run_ahead = True
    launched: list[str] = []
    step = backend.step
    monkeypatch.setattr(backend, "step", lambda *a: (launched.append("step"), step(*a))[1])
    shape = DecodeConfig(beam_width=2, branching=2, draft_length=4, tree_size=9)
    ids, statistics = run(Engine(backend, shape), PROMPT, params)
    # Five tokens each: the fourth fills the room, of which the third could not tell the host in time.
    assert ids == plain and statistics.steps == len(launched) == 4


def test_a_step_is_expected_to_give_what_the_last_one_gave() -> None:
    """In a loop that is more than the average."""
    shape = DecodeConfig(beam_width=2, branching=2, draft_length=4, tree_size=9)
    request = Request("a", [1], SamplingParams(), frozenset(), room=20, salt=None, added=0.0)
    found = []
    for tokens in ([1], [1], [1] * 9, [1]):
        request.statistics.count_step(shape, len(tokens) - 1, 9, 20)
        request.take(tokens)
        found.append(request.likely_ends(True))
    assert found == [False, False, True, False] and request.statistics.tokens_per_step == 3.0
    assert not request.likely_ends(False)


def test_an_ideal_drafter_fills_the_context_a_step_ahead() -> None:
    """The step after the last writes past the request's tokens: there must be room."""
    params = SamplingParams(max_new_tokens=500)
    longer, _ = run(Engine(make_backend(context=90), PLAIN), PROMPT, params)
    full, _ = run(Engine(make_backend(context=60), PLAIN), PROMPT, params)
    backend = make_backend(context=60)
    set_drafter(backend, ScriptedDrafter(PROMPT + longer))
    backend.run_ahead = True
    shape = DecodeConfig(beam_width=2, branching=2, draft_length=6, tree_size=12)
    ids, statistics = run(Engine(backend, shape), PROMPT, params)
    assert ids == full and len(ids) == 60 - len(PROMPT)
    assert statistics.tokens_per_step > 5


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_shapes_that_change_at_random_change_no_answer(backend: TorchBackend, seed: int, run_ahead: bool) -> None:
    visits = random_visits(100 + seed, 10)
    expected = alone(backend, visits)
    policy = at_random(seed)
    backend.run_ahead = run_ahead
    try:
        answers = play(Engine(backend, policy, max_batch=4), visits)
    finally:
        backend.run_ahead = False
    assert_equal(visits, answers, expected)
    assert {config for config, _, _ in policy.seen} == set(SHAPES)
    assert max(policy.rows) == 4
    for config, accepted, seconds in policy.seen:
        assert len(accepted) <= 4 and all(0 <= a <= config.draft_length for a in accepted)
        assert seconds is None or seconds > 0


@pytest.mark.parametrize("steps", [1, 12, 70])
def test_a_drafter_that_was_not_asked_for_a_while_has_missed_nothing(steps: int) -> None:
    """After plain steps it drafts what it drafts behind a prompt that holds their tokens, its trunk included."""
    backend = make_backend(context=240)  # empty: nothing an earlier test left in the trunk may help
    params = SamplingParams(temperature=1.0, seed=5, max_new_tokens=100)
    ids, late = run(Engine(backend, plain_first(steps), prefix_reuse=False), PROMPT, params)
    rest = SamplingParams(temperature=1.0, seed=5, max_new_tokens=100 - steps)
    again, fresh = run(Engine(backend, TREE, prefix_reuse=False), PROMPT + ids[:steps], rest)
    assert ids[steps:] == again and late.steps == fresh.steps + steps
    assert late.drafted_steps == fresh.drafted_steps == fresh.steps
    for name in ("accepted_at_depth", "tree_nodes", "unmerged_tokens"):
        assert getattr(late, name) == getattr(fresh, name), name


def test_the_seconds_of_a_step_beside_a_prompt_are_not_reported(backend: TorchBackend) -> None:
    policy = plain_first(3)
    run_all(Engine(backend, policy), [PROMPT], [SamplingParams(max_new_tokens=3)])
    assert [seconds is None for _, _, seconds in policy.seen] == [True, False, False]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_seconds_of_a_step_beside_a_change_of_rows_are_not_reported(backend: TorchBackend, run_ahead: bool) -> None:
    """The second request leaves after three tokens: a step that was in flight then, and the next one."""
    backend.run_ahead = run_ahead
    try:
        policy = plain_first(8)
        run_all(Engine(backend, policy), [PROMPT, PROMPT[:5]], [SamplingParams(max_new_tokens=n) for n in (8, 3)])
    finally:
        backend.run_ahead = False
    reported = [(len(accepted), seconds is not None) for _, accepted, seconds in policy.seen]
    disturbed = [(1, False)] * (1 + run_ahead)
    assert reported == [(2, False), (2, True), (2, True), *disturbed, *[(1, True)] * (5 - len(disturbed))]


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_long_prompt_stalls_nobody(run_ahead: bool) -> None:
    """2,000 tokens arrive while two requests run: each emits at every step, and nobody's answer changes."""
    backend = make_backend(context=2200)
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(3, VOCAB, (2000,), generator=generator).tolist()
    settings = [SamplingParams(max_new_tokens=90, temperature=t, seed=4) for t in (0.0, 1.0)]
    brief = SamplingParams(max_new_tokens=6)
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), PROMPT, p)[0] for p in settings]
    expected.append(run(Engine(backend, PLAIN, prefix_reuse=False), long, brief)[0])
    backend.run_ahead = run_ahead
    engine = Engine(backend, TREE, max_batch=3, prefix_reuse=False)
    for name, params in zip("ab", settings, strict=True):
        engine.add(name, PROMPT, params)
        engine.step()
    ids: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    engine.step()
    engine.add("c", long, brief)
    chunks = 0
    while engine.has_work:
        waiting = engine.load.waiting
        events = engine.step()
        if waiting and engine.load.running >= 2:
            chunks += 1
            assert {"a", "b"} <= {e.request_id for e in events if e.tokens}
        for event in events:
            ids[event.request_id] += event.tokens
            last = event.statistics
    assert chunks == 8 and ids["c"] == expected[2]
    for name, whole in zip("ab", expected, strict=False):
        assert whole[-len(ids[name]) :] == ids[name] and len(ids[name]) > 60
    assert last.prefill_seconds > 0


def test_a_request_is_cancelled_while_its_prompt_is_read(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 4)
    params = SamplingParams(max_new_tokens=30, temperature=1.0)
    expected, _ = run(Engine(backend, PLAIN), PROMPT, params)
    engine = Engine(backend, TREE, max_batch=2)
    engine.add("a", PROMPT, params)
    while not engine.load.running:
        assert engine.step() == [] or engine.load.running
    engine.add("b", PROMPT[::-1], params)
    engine.add("c", PROMPT, params)
    engine.step()
    assert engine.load.waiting == 2
    engine.cancel("b")
    engine.check()
    ids: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    while engine.has_work:
        for event in engine.step():
            ids[event.request_id] += event.tokens
        engine.check()
    assert ids["c"] == expected and ids["b"] == []
    assert expected[-len(ids["a"]) :] == ids["a"]


def test_short_prompts_are_read_together_and_never_more_than_a_chunk(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 4, 4, 4 and 11 tokens, the last of each not counted, in chunks of 8: two, then one, then the rest."""
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 8)
    prompts = [[5, 17, 33, 8, 90][: n + 1] for n in (4, 4, 4)] + [[7 + i for i in range(12)]]
    params = [SamplingParams(max_new_tokens=9, temperature=1.0, seed=i) for i in range(4)]
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), p, s)[0] for p, s in zip(prompts, params, strict=True)]
    engine = Engine(backend, TREE, max_batch=4, prefix_reuse=False)
    read = backend.prefill_chunk
    steps: list[list[int]] = []

    def watched(row: int, ids: list[int], start: int, before: Any) -> Any:
        found = read(row, ids, start, before)
        steps[-1].append(found[1] - start)
        return found

    monkeypatch.setattr(backend, "prefill_chunk", watched)
    for i, (prompt, setting) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(i), prompt, setting)
    ids: dict[str, list[int]] = {str(i): [] for i in range(4)}
    while engine.has_work:
        steps.append([])
        for event in engine.step():
            ids[event.request_id] += event.tokens
        engine.check()
    assert [tokens for tokens in steps if tokens] == [[4, 4], [4], [8], [3]]
    assert list(ids.values()) == expected


@pytest.fixture
def together(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The backend reads several prompts at once, 12 tokens at most: how many of each, call by call."""
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 12)
    monkeypatch.setattr(backend, "reads_together", True)
    read, calls = backend.prefill_chunks, list[list[int]]()

    def watched(parts: Sequence[PromptPart]) -> Any:
        found = read(parts)
        calls.append([end - part.start for part, (_, end) in zip(parts, found, strict=True)])
        return found

    monkeypatch.setattr(backend, "prefill_chunks", watched)
    return calls


def visits_of(*lengths: int) -> list[Visit]:
    """All at once, with prompts of these lengths, a prompt's last token not counted."""
    return [
        Visit(0, None, [7 + (5 * i + k) % 80 for k in range(n + 1)], SamplingParams(max_new_tokens=9, seed=i))
        for i, n in enumerate(lengths)
    ]


def test_prompts_are_read_at_once_where_that_saves_time(backend: TorchBackend, together: list[list[int]]) -> None:
    """As many whole ones as a chunk holds, in their order; a longer one alone; one of a single token with them."""
    visits = visits_of(4, 5, 4, 3, 0, 30, 2)
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), v.prompt, v.params)[0] for v in visits]
    together.clear()
    answers = play(Engine(backend, TREE, max_batch=7, prefix_reuse=False), visits)
    assert together == [[4, 5], [4, 3], [12], [12], [6, 2]]
    assert [answer.ids for answer in answers] == expected


def test_a_prompt_that_begins_like_one_being_read_waits_for_it(
    backend: TorchBackend, together: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redrafter.prefix.WORTH_WAITING", 3)
    first, other, same = visits_of(5, 4, 5)
    same.prompt[:5] = first.prompt[:5]
    backend.held.clear()
    play(Engine(backend, TREE, max_batch=3), [first, other, same])
    assert together == [[5, 4], [1]], "four of the last one's tokens are copied"


def test_of_prompts_read_at_once_one_fails_alone(
    backend: TorchBackend, together: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = visits_of(3, 3, 3)
    visits[1].prompt[1] = 66
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), v.prompt, v.params)[0] for v in visits]
    read = backend.prefill_chunks

    def broken(parts: Sequence[PromptPart]) -> Any:
        if any(66 in part.token_ids for part in parts):
            raise RuntimeError("whatever")
        return read(parts)

    monkeypatch.setattr(backend, "prefill_chunks", broken)
    answers = play(Engine(backend, TREE, max_batch=3, prefix_reuse=False), visits)
    assert [answer.reason for answer in answers] == ["length", "error", "length"]
    assert [answers[i].ids for i in (0, 2)] == [expected[i] for i in (0, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_traffic_whose_prompts_are_read_at_once(
    backend: TorchBackend, together: list[list[int]], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("redrafter.backends.base.PREFILL_CHUNK", 40)
    visits = random_visits(seed=seed, count=9, longest=30, cancels=2)
    one_by_one = play(Engine(backend, PLAIN, max_batch=1), visits)
    for prefix_reuse in (False, True):
        at_once = play(Engine(backend, TREE, max_batch=4, prefix_reuse=prefix_reuse), visits)
        for mine, alone in zip(at_once, one_by_one, strict=True):
            if "cancelled" not in (mine.reason, alone.reason):
                assert mine.ids == alone.ids
    assert max(map(len, together)) > 1


def test_who_comes_while_a_prompt_is_read_joins_in_the_same_step(backend: TorchBackend) -> None:
    visits = [Visit(0, None, PROMPT[i:], SamplingParams(max_new_tokens=6)) for i in range(4)]
    policy = Scripted((TREE,), iter([TREE] * 100))
    engine = Engine(backend, policy, max_batch=4, prefix_reuse=False)
    late = iter(range(1, 4))

    def arrive() -> None:
        for i in late:
            engine.add(str(i), visits[i].prompt, visits[i].params)
            break
        else:
            engine.cancel("1")

    ids: dict[str, list[int]] = {str(i): [] for i in range(4)}
    reasons: dict[str, str | None] = {}
    engine.add("0", visits[0].prompt, visits[0].params)
    while engine.has_work:
        for event in engine.step(arrive):
            ids[event.request_id] += event.tokens
            reasons[event.request_id] = event.finish_reason
        engine.check()
    assert policy.rows[0] == 3, "the fourth was cancelled by then"
    expected = alone(backend, visits)
    assert ids == {"0": expected[0], "1": [], "2": expected[2], "3": expected[3]}
    assert reasons == {"0": "length", "1": "cancelled", "2": "length", "3": "length"}
