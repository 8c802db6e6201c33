"""Engines that fail, memory that is gone, numbers that are none, texts that never end: named, and others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch

from redrafter.errors import OutOfMemory
from tests.server.client import chat, complete, error_of, events
from tests.server.serving import Running, metrics, running, text_threads, wait_for


def fail_once(run: Running, error: BaseException, when: Callable[[], bool] = lambda: True) -> None:
    """The next step of the engine, once ``when``, raises."""
    step = run.engine.step
    done = threading.Event()

    def failing(*given: Any) -> Any:
        if when() and not done.is_set():
            done.set()
            raise error
        return step(*given)

    run.engine.step = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_raises_ends_its_requests_and_the_next_are_served(stream: bool) -> None:
    with running() as run:
        good = chat(run.url).json()["choices"]
        fail_once(run, ValueError("something private"))
        response = chat(run.url, stream=stream)
        if stream:
            assert events(response)[-1]["error"]["code"] == "engine_error"
        else:
            assert response.status_code == 500 and error_of(response)["code"] == "engine_error"
        assert "private" not in response.text
        assert chat(run.url).json()["choices"] == good
        assert httpx2.get(run.url + "/health?deep=1").status_code == 200


def test_no_memory_for_one_request_is_told_to_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as run:
        good = chat(run.url).json()["choices"]
        reserve = run.engine.backend.reserve

        def small(rows: int, tokens: int) -> None:
            if tokens > 200:
                raise OutOfMemory("the cache needs 9 GB: 1 GB is free")
            reserve(rows, tokens)

        monkeypatch.setattr(run.engine.backend, "reserve", small)
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(chat, run.url)
            refused = chat(run.url, max_tokens=240)
            assert beside.result().json()["choices"] == good
        assert refused.status_code == 503 and "memory" in error_of(refused)["message"]


def test_no_memory_while_a_prompt_is_read_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as run:
        good = chat(run.url, max_tokens=60).json()["choices"]
        read = run.engine.backend.prefill_chunk

        def small(row: int, prompt: Any, *rest: Any) -> Any:
            if len(prompt) > 100:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return read(row, prompt, *rest)

        monkeypatch.setattr(run.engine.backend, "prefill_chunk", small)
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(chat, run.url, max_tokens=60)
            wait_for(lambda: run.service.worker.load.running == 1)
            refused = complete(run.url, prompt="why" * 50)
            assert beside.result().json()["choices"] == good
        assert refused.status_code == 503 and "memory" in error_of(refused)["message"]
        assert chat(run.url, max_tokens=60).json()["choices"] == good
        run.engine.check()


def test_no_memory_in_a_step_is_told_and_the_next_requests_are_served() -> None:
    with running() as run:
        good = chat(run.url).json()["choices"]
        fail_once(run, torch.OutOfMemoryError("CUDA out of memory"), lambda: run.service.worker.load.running == 2)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(chat, run.url, max_tokens=100) for _ in range(2)]
            for response in (one.result() for one in asked):
                assert response.status_code == 503 and "memory" in error_of(response)["message"]
        assert chat(run.url).json()["choices"] == good
        run.engine.check()


def test_numbers_that_are_not_finite_end_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as run:
        good = chat(run.url, max_tokens=30).json()["choices"]
        read = run.engine.backend.read

        def poisoned(handle: Any) -> Any:
            outcome = read(handle)
            bad = [r.params.seed == 666 and len(r.answer_ids) > 3 for r in run.engine._running]
            return outcome._replace(finite=[ok and not b for ok, b in zip(outcome.finite, bad, strict=True)])

        monkeypatch.setattr(run.engine.backend, "read", poisoned)
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(chat, run.url, max_tokens=30)
            bad = chat(run.url, seed=666, max_tokens=30)
            assert beside.result().json()["choices"] == good
        assert bad.status_code == 200
        assert bad.json()["choices"][0]["finish_reason"] == "error"
        assert 3 < bad.json()["usage"]["completion_tokens"] < 30
        assert events(chat(run.url, seed=666, stream=True))[-1]["choices"][0]["finish_reason"] == "error"
        assert 'vllm:corrupted_requests_total{engine="0",model_name="tiny"} 2.0' in metrics(run)


@pytest.mark.parametrize("error", [SystemExit(0), MemoryError()])
def test_the_death_of_the_engine_is_told_to_everybody(error: BaseException) -> None:
    with running() as run:
        if isinstance(error, MemoryError):  # the engine does not come back from it: every step raises

            def broken(*_: Any) -> Any:
                raise error

            run.engine.step = broken  # type: ignore[method-assign]
        else:
            fail_once(run, error, lambda: run.service.worker.load.running > 0)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(chat, run.url, stream=stream, max_tokens=200) for stream in (True, False)]
            stream, whole = (one.result() for one in asked)
        # The one that asks second may find the engine dead already.
        told = error_of(stream) if stream.status_code == 503 else events(stream)[-1]["error"]
        assert told["type"] == "server_error"
        assert whole.status_code in (500, 503) and error_of(whole)
        wait_for(lambda: not run.service.worker.alive)
        for path in ("/health", "/ready"):
            response = httpx2.get(run.url + path)
            assert response.status_code == 503 and error_of(response)["code"] == "unavailable"
        assert "engine" in error_of(chat(run.url))["message"] and chat(run.url).status_code == 503
        assert httpx2.get(run.url + "/v1/models").status_code == 200


def test_a_step_that_hangs_fails_health(slow: Running) -> None:
    object.__setattr__(slow.service.settings, "stall_timeout", 0.1)
    go_on = threading.Event()
    step = slow.engine.step

    def hanging(*given: Any) -> Any:
        go_on.wait(20)
        return step(*given)

    slow.engine.step = hanging  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(chat, slow.url)
        wait_for(lambda: httpx2.get(slow.url + "/health").status_code == 503)
        go_on.set()
        assert asked.result().status_code == 200
    assert httpx2.get(slow.url + "/health").status_code == 200


def test_a_template_that_never_ends_is_given_up_with_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    with running(render_timeout=0.8) as run:
        good = chat(run.url).json()["choices"]
        before = text_threads()  # other servers of these tests have theirs
        encode = run.llm.tokenizer.encode_chat

        def hanging(messages: Any) -> list[int]:
            if messages[0]["content"] == "hang":
                never.wait(30)
            return encode(messages)

        monkeypatch.setattr(run.llm.tokenizer, "encode_chat", hanging)
        try:
            for _ in range(2):
                response = chat(run.url, messages=[{"role": "user", "content": "hang"}])
                assert response.status_code == 503 and "messages" in error_of(response)["message"]
                assert chat(run.url).json()["choices"] == good
        finally:
            never.set()
        wait_for(lambda: text_threads() == before)
        assert chat(run.url).json()["choices"] == good


def test_one_text_that_fails_does_not_stop_the_next(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    good = chat(server.url).json()["choices"]
    monkeypatch.setattr(server.llm.tokenizer, "encode_chat", lambda messages: 1 // 0)
    response = chat(server.url)
    assert response.status_code == 500 and error_of(response)["code"] == "internal"
    monkeypatch.undo()
    assert chat(server.url).json()["choices"] == good
