"""Requests that come, are cancelled and stop at random, played through an engine step by step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from redrafter.engine import Engine
from redrafter.params import SamplingParams
from redrafter.requests import Event, RequestStatistics
from tests.tiny import VOCAB

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 2.0, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 1.5, "seed": 9, "frequency_penalty": 0.3, "logit_bias": {7: 4.0, 30: 2.5}},
)


class Visit(NamedTuple):
    arrives: int
    """step"""
    cancelled: int | None
    prompt: list[int]
    params: SamplingParams


class Answer(NamedTuple):
    ids: list[int]
    reason: str
    statistics: RequestStatistics
    events: list[Event]

    @property
    def counts(self) -> dict[str, Any]:
        """The statistics without times."""
        return {k: v for k, v in asdict(self.statistics).items() if not k.endswith("seconds") and k != "_first"}


def random_visits(seed: int, count: int, *, cancels: float = 0.2, longest: int = 40) -> list[Visit]:
    """Half of the prompts begin alike."""
    rng = random.Random(seed)
    common = [rng.randrange(3, VOCAB) for _ in range(longest)]
    visits = []
    for _ in range(count):
        arrives, length = rng.randrange(2 * count), rng.randint(1, longest)
        alike = rng.choice((0, length, rng.randint(0, length)))
        prompt = common[:alike] + [rng.randrange(3, VOCAB) for _ in range(length - alike)]
        stop = tuple(rng.sample(range(3, VOCAB), 4)) if rng.random() < 0.4 else ()
        params = SamplingParams(max_new_tokens=rng.randint(1, 24), stop_token_ids=stop, **rng.choice(SETTINGS))
        cancelled = arrives + rng.randrange(12) if rng.random() < cancels else None
        visits.append(Visit(arrives, cancelled, prompt, params))
    return visits


def play(engine: Engine, visits: Sequence[Visit]) -> list[Answer]:
    """Every visit's answer; the engine's invariants are checked after each step."""
    events: dict[str, list[Event]] = {str(i): [] for i in range(len(visits))}
    step = 0
    while engine.has_work or any(v.arrives >= step for v in visits):
        for i, visit in enumerate(visits):
            if visit.arrives == step:
                engine.add(str(i), visit.prompt, visit.params)
            if visit.cancelled == step:
                engine.cancel(str(i))
                engine.check()
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check()
        step += 1
        assert step < 2000
    answers = []
    for given in events.values():
        assert [e.finish_reason is not None for e in given] == [False] * (len(given) - 1) + [True]
        ids = [token for event in given for token in event.tokens]
        answers.append(Answer(ids, str(given[-1].finish_reason), given[-1].statistics, given))
    return answers
