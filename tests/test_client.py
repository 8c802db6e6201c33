"""The client over a played server: what it understands, and that every failure is a ServerFailed in one line."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from redrafter.client import Client, Span
from redrafter.errors import InvalidRequest, ServerFailed
from tests.server.page_server import Play, playing


@pytest.fixture
def play() -> Iterator[Play]:
    with playing(Play()) as play:
        yield play


def failure(play: Play) -> str:
    with pytest.raises(ServerFailed) as failed:
        list(Client(play.url).stream({"messages": []}))
    assert "\n" not in str(failed.value)
    return str(failed.value).removeprefix(play.url)


def test_spans_tokens_and_usage(play: Play) -> None:
    events = list(Client(play.url).stream({"messages": []}))
    assert events[2].spans == (Span(" is", True), Span(" blue", True), Span(" today", False))
    assert [event.tokens for event in events] == [1, 1, 3, 1, 0, 0]
    assert [event.finish_reason for event in events] == [None] * 4 + ["stop", None]
    assert [event.answer_tokens for event in events] == [None] * 5 + [6]


def test_a_server_without_details_gives_text(play: Play) -> None:
    play.details = False
    events = list(Client(play.url).stream({"messages": []}))
    assert events[2].spans == (Span(" is blue today", False),)
    assert [event.tokens for event in events] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"status": 503, "headers": {"Retry-After": "7"}}, " is busy: try again in 7 s"),
        ({"status": 503}, " is busy: try again soon"),
        ({"status": 429, "headers": {"Retry-After": "Wed, 25 Nov"}}, " had too many requests with this key"),
        ({"status": 400}, " answered 400: these words"),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}, " answered 302: these words"),
        ({"key": "k"}, " wants an API key (no valid API key)"),
        ({"break_off": True}, " ended the connection before the answer"),
        ({"last": {"error": {"message": "out of\nmemory"}}}, " broke the answer off: out of memory"),
        ({"last": {"choices": [{"delta": {}, "finish_reason": "error"}]}}, " failed in the middle of the answer"),
        ({"last": 7}, " sent an event that is no chat completion: b'7'"),
        ({"last": {"redrafter": {"spans": [1]}}}, " sent an event that is no chat completion"),
    ],
)
def test_every_failure_is_said(play: Play, settings: dict, says: str) -> None:
    for name, value in settings.items():
        setattr(play, name, value)
    assert failure(play).startswith(says)


def test_silence_is_a_failure(play: Play) -> None:
    play.delay = 0.5
    with pytest.raises(ServerFailed, match=r"said nothing for 0\.1 s"):
        list(Client(play.url, timeout=0.1).stream({"messages": []}))


def test_closing_the_iterator_closes_the_connection(play: Play) -> None:
    play.steps, play.delay = [([("x", False)], None)] * 200, 0.01
    events = Client(play.url).stream({"messages": []})
    next(events)
    events.close()
    deadline = time.monotonic() + 10
    while not play.disconnects and time.monotonic() < deadline:
        time.sleep(0.01)
    assert play.disconnects == 1


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no header can carry"):
        Client("http://127.0.0.1:1", "a\nb")


def test_the_client_brings_nothing_heavy() -> None:
    code = "import sys, redrafter.client; sys.exit(bool({'torch', 'transformers', 'httpx', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
