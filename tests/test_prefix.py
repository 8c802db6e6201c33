"""Prompts that begin alike: what is copied instead of computed changes no answer and no draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch

from redrafter.backends.torch.load import TorchBackend
from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.test_engine_schedule import assert_equal
from tests.tiny import make_backend, run
from tests.traffic import Answer, Visit, play, random_visits

TREE = DecodeConfig(beam_width=3, branching=3, draft_length=4, tree_size=12)
PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]
PARAMS = SamplingParams(max_new_tokens=20)


@pytest.fixture
def backend() -> TorchBackend:
    return make_backend(context=240)


@cache
def other_backend() -> TorchBackend:
    return make_backend(context=240)


def fresh(prompt: list[int], params: SamplingParams = PARAMS, config: DecodeConfig = TREE) -> Answer:
    """The answer of an engine that takes nothing from its cache."""
    engine = Engine(other_backend(), config, prefix_reuse=False)
    return play(engine, [Visit(0, None, prompt, params)])[0]


def ask(engine: Engine, prompt: list[int], params: SamplingParams = PARAMS) -> Answer:
    return play(engine, [Visit(0, None, prompt, params)])[0]


def assert_caches_hold(backend: TorchBackend, text: list[int]) -> None:
    """Row 0 holds what reading the text at once would put there: all but the root, and the pairs of these tokens."""
    other = other_backend()
    other.reserve(1, len(text) + 20)
    other.prefill(0, text[:-1])
    mine, theirs = (
        [
            *(x[:, 0, :, : len(text) - 1] for x in (b.target.cache.keys, b.target.cache.values)),
            *(x[0, :, : len(text) - 2] for x in (*b.drafter._keys, *b.drafter._values)),  # type: ignore[union-attr]
        ]
        for b in (backend, other)
    )
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def same(a: Answer, b: Answer) -> bool:
    """Ids, reason and every count but the reused tokens."""
    return (a.ids, a.reason, {**a.counts, "reused_tokens": 0}) == (b.ids, b.reason, {**b.counts, "reused_tokens": 0})


def test_a_prompt_asked_again_is_not_computed_again(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but its last two tokens: the root, and the one whose features open the drafter's first reading."""
    engine = Engine(backend, TREE)
    first = ask(engine, PROMPT)
    read: list[int] = []
    prefill = backend.target.prefill
    monkeypatch.setattr(
        backend.target, "prefill", lambda row, ids, start: (read.append(len(ids)), prefill(row, ids, start))[1]
    )
    again = ask(engine, PROMPT)
    assert read == [1] and again.statistics.reused_tokens == len(PROMPT) - 2
    assert first.statistics.reused_tokens == 0 and same(first, again) and same(again, fresh(PROMPT))


@pytest.mark.parametrize("cut", [-3, -1, 0, 1, 2, 7])
@pytest.mark.parametrize("config", [TREE, PLAIN], ids=["tree", "plain"])
def test_a_conversation_goes_on(backend: TorchBackend, config: DecodeConfig, cut: int) -> None:
    """The next prompt holds the last answer, or all but its last tokens, or more: whatever is taken of it was written
    there. Then the drafter too, asked by the same engine or by its speculative twin, drafts as if it had read it."""
    first = ask(Engine(backend, config), PROMPT)
    text = PROMPT + first.ids[: len(first.ids) - cut if cut > 0 else None] + [50, 51, 52][: max(0, -cut)] + [9, 8]
    following = ask(Engine(backend, TREE), text)
    assert same(following, fresh(text))
    assert_caches_hold(backend, text)
    reused = following.statistics.reused_tokens
    if config is PLAIN:  # the drafter has not read the answer
        assert reused == len(PROMPT) - 2
    else:
        assert len(PROMPT) - 2 <= reused < len(PROMPT) + len(first.ids)


def test_the_bonus_of_the_last_step_is_not_in_the_cache(backend: TorchBackend) -> None:
    """Nor are tokens cut at a stop: what a prompt takes ends before them."""
    whole = ask(Engine(backend, PLAIN), PROMPT)
    backend.held.clear()
    expected = fresh(PROMPT + whole.ids).ids
    for stop in range(1, 8):
        params = SamplingParams(max_new_tokens=20, stop_token_ids=(whole.ids[stop],))
        cut = ask(Engine(backend, TREE), PROMPT, params)
        text = PROMPT + whole.ids
        following = ask(Engine(backend, TREE), text)
        assert following.ids == expected
        assert_caches_hold(backend, text)
        assert following.statistics.reused_tokens < len(PROMPT) + len(cut.ids)
        backend.held.clear()


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_random_traffic_gives_the_answers_of_an_empty_cache(backend: TorchBackend, seed: int, run_ahead: bool) -> None:
    visits = random_visits(200 + seed, 18)
    expected = [run(Engine(backend, PLAIN, prefix_reuse=False), v.prompt, v.params)[0] for v in visits]
    apart = [fresh(v.prompt, v.params) for v in visits]
    backend.run_ahead = run_ahead
    answers = play(Engine(backend, TREE, max_batch=4), visits)
    assert_equal(visits, answers, expected)
    for visit, answer, single in zip(visits, answers, apart, strict=True):
        assert visit.cancelled is not None or same(answer, single)
    assert sum(a.statistics.reused_tokens for a in answers) >= 20
    off = play(Engine(backend, TREE, max_batch=4, prefix_reuse=False), visits)
    assert_equal(visits, off, expected)
    assert sum(a.statistics.reused_tokens for a in off) == 0


def test_a_tail_that_differs_is_read_anew(backend: TorchBackend) -> None:
    """The last common token's pair was made with the token after it, which is another one here."""
    for common in range(2, len(PROMPT) - 1):
        ask(Engine(backend, TREE), PROMPT)
        text = [*PROMPT[:common], 94, 93, 92]
        assert ask(Engine(backend, TREE), text).statistics.reused_tokens == common - 1
        assert_caches_hold(backend, text)


def test_running_requests_share_too(backend: TorchBackend) -> None:
    visits = [Visit(2 * i, None, PROMPT, SamplingParams(max_new_tokens=20, temperature=1.0, seed=i)) for i in range(3)]
    answers = play(Engine(backend, TREE, max_batch=3), visits)
    assert [a.statistics.reused_tokens for a in answers] == [0, len(PROMPT) - 2, len(PROMPT) - 2]
    assert all(same(a, fresh(v.prompt, v.params)) for a, v in zip(answers, visits, strict=True))


def test_a_salt_keeps_tenants_apart(backend: TorchBackend) -> None:
    engine = Engine(backend, TREE)
    reused = []
    for i, salt in enumerate(("a", "b", None, "b", "a")):
        engine.add(str(i), PROMPT, PARAMS, cache_salt=salt)
        while engine.has_work:
            for event in engine.step():
                last = event
        reused.append(last.statistics.reused_tokens)
        backend.reserve(3, 100)  # rows enough to keep them all
    assert reused == [0, 0, 0, len(PROMPT) - 2, len(PROMPT) - 2]


def conversations(engine: Engine, prompts: Sequence[list[int]]) -> Iterator[int]:
    for prompt in prompts:
        yield ask(engine, prompt).statistics.reused_tokens


def test_the_row_left_longest_ago_is_taken_first(backend: TorchBackend) -> None:
    a, b, c, d = ([i, *PROMPT] for i in (70, 71, 72, 73))
    full = len(PROMPT) - 1
    backend.reserve(3, 100)
    engine = Engine(backend, TREE, max_batch=3)
    assert list(conversations(engine, [a, b, c, a, b, c])) == [0, 0, 0, full, full, full]
    assert list(conversations(engine, [d, b, c, d, a])) == [0, full, full, full, 0]


def test_what_is_not_a_text_is_not_reused(backend: TorchBackend) -> None:
    """Rows of a request that failed, and rows overwritten from outside the engine."""
    engine = Engine(backend, TREE)
    verify = backend.target.verify

    def poisoned(tree: object, lengths: object) -> tuple:
        logits, features = verify(tree, lengths)  # type: ignore[arg-type]
        return logits * float("nan"), features

    backend.target.verify = poisoned  # type: ignore[method-assign]
    assert ask(engine, PROMPT).reason == "error"
    backend.target.verify = verify  # type: ignore[method-assign]
    assert ask(engine, PROMPT).statistics.reused_tokens == 0
    backend.prefill(0, PROMPT[::-1])
    assert same(ask(engine, PROMPT), fresh(PROMPT)) and not engine.has_work
