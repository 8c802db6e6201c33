"""Small versions of what ``benchmarks/serving.py`` counts."""

from __future__ import annotations

from tests.server.load import disconnect, hold_streams, long_prompt, short_requests
from tests.server.serving import Running, running, tiny_llm


def ignore(_: str) -> None:
    """Progress that nobody watches."""


def test_many_streams_run_at_once_and_each_is_what_it_is_alone() -> None:
    with running(tiny_llm(context=96, max_batch=20), max_queue=20) as run:
        held = hold_streams(run, 20, 70, ignore)
    assert held.complete == 20
    assert held.at_once >= 16 and held.running >= 16


def test_clients_that_leave_leave_nothing_behind(server: Running) -> None:
    found = disconnect(server, 40, seed=1, tell=ignore)
    assert (found["leaked"], found["next_answer_differs"]) == (0, 0)
    assert found["left before any answer"] and found["left after the first byte"]


def test_short_requests_are_all_answered(server_url: str) -> None:
    assert short_requests(server_url, 60, at_once=4, tell=ignore) == {200: 60}


def test_a_long_prompt_is_read_a_chunk_at_a_time_between_the_steps_of_others() -> None:
    with running(tiny_llm(context=1400)) as run:
        gaps = long_prompt(run, 2, [1 + i % 200 for i in range(1100)], 250, ignore)
    assert gaps.chunks >= 2
    assert gaps.most_between == 1
