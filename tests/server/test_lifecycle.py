"""Clients that leave, wait or do not read; a full house; shutting down. Others notice nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from redrafter.load import settle_memory
from redrafter.server import answers as answers_module
from redrafter.server import run as run_module
from tests.server.client import MESSAGES, chat, dial, error_of, events, receive_until, request_bytes
from tests.server.serving import Running, idle, metrics, running, tiny_llm, wait_for

LONG = {"messages": MESSAGES, "max_tokens": 240, "seed": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_step(
    slow: Running, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    connection = dial(slow.url)
    connection.sendall(request_bytes({**LONG, "stream": stream}))
    if stream:
        receive_until(connection, b"data: ")
    wait_for(lambda: slow.service.worker.load.running == 1)
    connection.close()
    left = time.monotonic()
    wait_for(lambda: idle(slow))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert time.monotonic() - left < 1.0, "an answer of 240 tokens takes seconds"
    assert chat(slow.url).status_code == 200
    slow.engine.check()


def test_a_client_that_leaves_the_queue_leaves_the_others_alone(slow: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, slow.url, max_tokens=40)
        wait_for(lambda: slow.service.worker.load.running == 1)
        waiting = dial(slow.url)
        waiting.sendall(request_bytes(LONG))
        wait_for(lambda: slow.service.worker.open_requests == 2)
        waiting.close()
        wait_for(lambda: slow.service.worker.open_requests < 2)
        assert first.result().json()["usage"]["completion_tokens"] == 40
    wait_for(lambda: idle(slow))


def test_a_full_house_says_so_at_once_and_when_to_come_again(slow: Running) -> None:
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(chat, slow.url, max_tokens=40) for _ in range(2)]
        wait_for(lambda: slow.service.worker.open_requests == 2)
        refused = chat(slow.url)
        assert not any(one.done() for one in taken), "the refusal waited for nobody"
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "overloaded"
        assert chat(slow.url, n=2).status_code == 503
        assert error_of(chat(slow.url, n=3))["param"] == "n", "more than could ever be served at once"
        assert [t.result().status_code for t in taken] == [200, 200]
    assert chat(slow.url).status_code == 200
    assert 'redrafter:admission_rejections_total{engine="0",model_name="tiny",reason="queue_full"} 2.0' in metrics(slow)


def test_plain_decoding_waits_for_nobody_and_nobody_waits_for_it(slow: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        drafted = pool.submit(chat, slow.url, max_tokens=40)
        wait_for(lambda: slow.service.worker.load.running == 1)
        refused = chat(slow.url, speculation=False)
        assert refused.status_code == 503 and "plain" in error_of(refused)["message"]
        assert drafted.result().status_code == 200
    assert chat(slow.url, speculation=False).json()["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def stall(run: Running) -> asyncio.Event:
    """Requests with the header X-Stall are sent nothing more than the headers until the event is set."""
    go_on = asyncio.Event()
    app = run.server.config.app

    async def stalling_app(scope: Any, receive: Any, send: Any) -> None:
        async def stalling(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.wait_for(go_on.wait(), 20)
            await send(message)

        stalls = scope["type"] == "http" and b"x-stall" in dict(scope["headers"])
        await app(scope, receive, stalling if stalls else send)

    run.server.config.loaded_app = stalling_app
    return go_on


def ask_and_stall(run: Running) -> httpx2.Response:
    body = {**LONG, "max_tokens": 400, "stream": True}
    return httpx2.post(run.url + "/v1/chat/completions", json=body, headers={"X-Stall": "1"}, timeout=60)


def test_a_client_that_reads_late_is_cut_off_and_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_UNREAD", 20)
    with running(tiny_llm(context=512)) as run:
        expected = chat(run.url, max_tokens=60).json()["choices"]
        go_on = stall(run)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(ask_and_stall, run)
            wait_for(lambda: run.service.worker.open_requests == 1)
            assert chat(run.url, max_tokens=60).json()["choices"] == expected
            wait_for(lambda: idle(run))
            run.server.loop.call_soon_threadsafe(go_on.set)
            told = events(late.result())
        assert told[-1]["error"]["code"] == "slow_reader"
        assert len(told) <= 25


def test_a_client_that_never_reads_loses_its_connection() -> None:
    with running(tiny_llm(context=512), send_timeout=0.1) as run:
        stall(run)
        with pytest.raises(httpx2.TransportError):
            ask_and_stall(run)
        wait_for(lambda: idle(run))
        assert chat(run.url).status_code == 200


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_never_end_lose_their_connection(monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    monkeypatch.setattr(run_module, "HEADER_TIMEOUT", 0.2)
    with running() as run, dial(run.url) as connection:
        connection.sendall(before)
        if before:
            receive_until(connection, b"}")
        connection.sendall(b"GET /health HTTP/1.1\r\nHos")
        began = time.monotonic()
        assert connection.recv(1000) == b""
        assert time.monotonic() - began < 4, "otherwise it is kept for 5 seconds"
        assert chat(run.url, max_tokens=60).status_code == 200


def test_a_silent_stream_is_kept_alive_with_comments(slow: Running) -> None:
    object.__setattr__(slow.service.settings, "keep_alive", 0.05)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, slow.url, max_tokens=30)
        wait_for(lambda: slow.service.worker.load.running == 1)
        text = chat(slow.url, stream=True, max_tokens=2).text
        assert first.result().status_code == 200
    assert text.count(": keep-alive\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


def test_shutting_down_lets_running_answers_end() -> None:
    with running(drain=20.0) as run:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(chat, run.url, stream=index % 2 == 0, max_tokens=100) for index in range(4)]
            wait_for(lambda: run.service.worker.open_requests == 4)
            run.stop()
            responses = [one.result() for one in asked]
        assert [r.status_code for r in responses] == [200] * 4
        assert all(events(r)[-1]["choices"][0]["finish_reason"] == "length" for r in responses[::2])
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(run.url + "/health")


def test_answers_that_take_longer_than_the_drain_end_with_an_error(slow: Running) -> None:
    object.__setattr__(slow.service.settings, "drain", 0.2)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(chat, slow.url, stream=True, max_tokens=240)
        whole = pool.submit(chat, slow.url, max_tokens=240)
        wait_for(lambda: slow.service.worker.open_requests == 2)
        slow.stop()
        assert events(stream.result())[-1]["error"]["code"] == "unavailable"
        assert whole.result().status_code == 503
        assert error_of(whole.result())["code"] == "unavailable"


def test_while_draining_nothing_new_is_taken(server: Running) -> None:
    server.service.draining = True
    try:
        assert chat(server.url).status_code == 503
        assert httpx2.get(server.url + "/ready").status_code == 503
        assert httpx2.get(server.url + "/health").status_code == 200
    finally:
        server.service.draining = False
    assert chat(server.url).status_code == 200


def test_a_body_that_does_not_come_is_given_up(server: Running) -> None:
    object.__setattr__(server.service.settings, "body_timeout", 0.1)
    try:
        with dial(server.url) as connection:
            connection.sendall(request_bytes(LONG)[:-10])
            said = receive_until(connection, b"}}")
    finally:
        object.__setattr__(server.service.settings, "body_timeout", 30.0)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_what_was_loaded_is_not_looked_at_again_by_the_garbage_collector() -> None:
    before = gc.get_freeze_count()
    settle_memory()
    try:
        assert gc.get_freeze_count() > before
        assert len(gc.get_objects()) < 0.1 * gc.get_freeze_count()
    finally:
        gc.unfreeze()
