"""What a server refuses, and in which words: always OpenAI's shape, always the field at fault, never a 5xx."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from redrafter.server.body import _depth
from redrafter.server.schemas import UNSUPPORTED
from tests.server import malformed
from tests.server.client import chat, complete, error_of, post, raw
from tests.server.serving import Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("fields", "param"),
    malformed.CHAT_FIELDS,
)
def test_a_field_that_cannot_be_is_named(server_url: str, fields: dict[str, Any], param: str) -> None:
    response = chat(server_url, **fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.partition("[")[0] in error["message"] or param == "messages[0].content"


@pytest.mark.parametrize(
    ("fields", "param"),
    malformed.TEXT_FIELDS,
)
def test_a_field_of_text_completions_that_cannot_be_is_named(server_url: str, fields: dict, param: str) -> None:
    response = complete(server_url, **fields)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_known_field_that_is_not_supported_is_named(server_url: str, name: str) -> None:
    response = chat(server_url, **{name: [{"something": "asked"}]})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    for nothing in (None, *UNSUPPORTED[name]):
        assert chat(server_url, **{"max_tokens": 1, name: nothing}).status_code == 200


@pytest.mark.parametrize(
    "body",
    malformed.BODIES,
)
def test_what_is_no_json_or_no_request_is_refused(server_url: str, body: bytes) -> None:
    response = post(server_url, CHAT, body)
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"


def test_depth_counts_brackets_outside_of_strings_only() -> None:
    many = b"[" + b"[],{}," * 40 + b'"x"]'
    assert _depth(many) == 2
    assert _depth(b'["' + b"[" * 100 + b'"]') == 1
    assert _depth(b'["\\"' + b"[" * 100 + b'\\\\"' + b",[]" * 40 + b"]") == 2
    assert _depth(b"[" * 80 + b"]" * 80) == 80
    assert _depth(b"[[]]") == 0, "few brackets cannot be deep"


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_content_type_is_refused(server_url: str, kind: str) -> None:
    response = httpx2.post(server_url + CHAT, content=b"{}", headers={"Content-Type": kind})
    assert response.status_code == 415 and error_of(response)["code"] == "unsupported_media_type"
    zipped = post(server_url, CHAT, b"{}", headers={"Content-Encoding": "gzip"})
    assert zipped.status_code == 415 and error_of(zipped)


def test_a_content_type_may_say_its_charset(server_url: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert post(server_url, TEXT, {"prompt": "a", "max_tokens": 1}, headers=headers).status_code == 200


def test_a_body_over_the_limit_is_refused_by_its_length_and_while_it_comes(server_url: str) -> None:
    big = b"[" + b" " * (8 * 2**20) + b"]"
    assert error_of(post(server_url, CHAT, big))["code"] == "body_too_large"

    def parts() -> Any:
        for _ in range(9):
            yield b" " * 2**20

    response = httpx2.post(server_url + CHAT, content=parts(), headers={"Content-Type": "application/json"}, timeout=60)
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
    assert chat(server_url).status_code == 200


def test_a_prompt_over_the_context_is_told_both_numbers(server_url: str) -> None:
    response = chat(server_url, messages=[{"role": "user", "content": "a" * 400}])
    error = error_of(response)
    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "the prompt has 403 tokens" in error["message"] and "holds 256" in error["message"]


def test_a_prompt_that_is_surely_too_long_is_not_even_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm.tokenizer, "encode", lambda text: pytest.fail("it was"))
    monkeypatch.setattr(server.llm.tokenizer, "encode_chat", lambda text: pytest.fail("it was"))
    text = "a" * 2_000_000
    for response in (complete(server.url, prompt=text), chat(server.url, messages=[{"role": "user", "content": text}])):
        assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    malformed.ROUTES,
)
def test_wrong_routes_and_methods(server_url: str, method: str, path: str, status: int) -> None:
    response = httpx2.request(method, server_url + path)
    assert response.status_code == status
    assert error_of(response)["code"] == ("model_not_found" if path.startswith("/v1/models/") else "route")
    assert status != 405 or response.headers["allow"]
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    "data",
    malformed.NO_HTTP,
)
def test_what_is_no_http_gets_an_error_in_the_same_shape(server_url: str, data: bytes) -> None:
    head, _, body = raw(server_url, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert httpx2.Response(400, content=body).json()["error"]["type"] == "invalid_request_error"


def test_many_headers_are_refused(server_url: str) -> None:
    response = httpx2.get(server_url + "/health", headers=[(f"X-{i}", "a") for i in range(300)])
    assert response.status_code == 431 and error_of(response)["code"] == "headers"


def test_a_websocket_is_a_get_like_any_other(server_url: str) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "a"}
    response = httpx2.get(server_url + CHAT, headers=headers)
    assert response.status_code == 405 and error_of(response)


def test_template_errors_are_the_requests(server_url: str) -> None:
    response = chat(server_url, chat_template="{{ 7 * 7 }}")
    assert error_of(response)["param"] == "chat_template"


@pytest.mark.slow
def test_at_least_150_malformed_requests_leave_the_server_as_it_was(server: Running) -> None:
    before = chat(server.url).json()["choices"]
    told = list(malformed.ask_all(server.url))
    assert len({answer.name for answer in told}) == len(told) >= 150
    assert not [answer for answer in told if answer.status != answer.wanted or not answer.shaped]
    assert chat(server.url).json()["choices"] == before
    server.engine.check()
