"""Requests that are wrong, made by hand: what each should be told. ``ask_all`` sends them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2

from redrafter.server.schemas import UNSUPPORTED
from tests.server.client import MESSAGES, chat, complete, error_of, post, raw

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "why"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": MESSAGES * 2049}, "messages"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 10**40}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 300}, "max_tokens"),
    ({"max_tokens": 2**31 - 1}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"280": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"speculation": "no"}, "speculation"),
    ({"messages": {}}, "messages"),
    ({"messages": [[]]}, "messages[0]"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "USER", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "a", "name": 1}]}, "messages[0].name"),
    ({"n": 1.5}, "n"),
    ({"n": [1]}, "n"),
    ({"n": {}}, "n"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": "8"}, "max_completion_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_completion_tokens": 2**63}, "max_completion_tokens"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"temperature": 10**9}, "temperature"),
    ({"temperature": -1e-9}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": "1"}, "top_p"),
    ({"top_p": False}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": "5"}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 10**25}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": "0"}, "min_p"),
    ({"presence_penalty": -2.01}, "presence_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"frequency_penalty": 2.01}, "frequency_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"frequency_penalty": []}, "frequency_penalty"),
    ({"repetition_penalty": 1e-5}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"repetition_penalty": "1"}, "repetition_penalty"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"seed": True}, "seed"),
    ({"stop": {}}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": [None]}, "stop[0]"),
    ({"stop": ["a" * 10**6]}, "stop[0]"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": "a"}, "logit_bias"),
    ({"logit_bias": {"1": "a"}}, "logit_bias[...]"),
    ({"logit_bias": {"1": None}}, "logit_bias[...]"),
    ({"logit_bias": {"1": -101}}, "logit_bias[...]"),
    ({"logit_bias": {"1.5": 1}}, "logit_bias"),
    ({"logit_bias": {str(2**31): 1}}, "logit_bias"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [0] * 1025}, "stop_token_ids"),
    ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": "2", "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 1.5, "logprobs": True}, "top_logprobs"),
    ({"logprobs": "true"}, "logprobs"),
    ({"stream": 1}, "stream"),
    ({"stream": {}}, "stream"),
    ({"stream_options": True, "stream": True}, "stream_options"),
    ({"stream_options": [], "stream": True}, "stream_options"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options.include_usage"),
    ({"stream_options": {"continuous_usage_stats": 1}, "stream": True}, "stream_options.continuous_usage_stats"),
    ({"model": []}, "model"),
    ({"model": "a" * 513}, "model"),
    ({"user": 5}, "user"),
    ({"user": "a" * 513}, "user"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"speculation": 0}, "speculation"),
]
"""fields of a chat, and the one that the 400 names; the context holds 256 tokens, the vocabulary 280"""

TEXT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, 280]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, "b"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a" * 300}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [None]}, "prompt[0]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[1, 2]]}, "prompt[0]"),
    ({"prompt": [""]}, "prompt[0]"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": [2**70]}, "prompt[0]"),
    ({"prompt": [1] * 300}, "prompt"),
    ({"prompt": [1] * 255, "max_tokens": 2}, "max_tokens"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": "1"}, "logprobs"),
    ({"logprobs": 1.5}, "logprobs"),
]
BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e400}',
    b'{"messages": [{"role": "user", "content": "a"}],}',
    b'{"messages": [{"role": "user", "content": "a"}]} {}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"messages": [{"role": "user", "content": "a"}], "x": ' + b"[" * 64 + b"]" * 64 + b"}",
    b"1" * 5000,
    b" ",
    b"\x00",
    b"nul",
    b"true",
    b"1e400",
    b"-",
    b"{'messages': []}",
    b'{"messages": [}',
    b'{"messages"',
    b'{"messages": [{"role": "user", "content": "a}]}',
    b'{"messages": [{"role": "user", "content": "\\x41"}]}',
    b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
    b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": -Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 01}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": .5}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0x1}',
    b'// why\n{"messages": [{"role": "user", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "messages": []}',
    b"messages=why",
    "\u007b\u007d".encode("utf-16"),
    "{}".encode("utf-32"),
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    b"-0" * 5000,
    b'{"messages": [{"role": "user", "content": "a"}], "x": ' + b'{"a":' * 64 + b"1" + b"}" * 65,
]
"""no JSON, or no request"""

ROUTES: list[tuple[str, str, int]] = [
    ("GET", "/nothing", 404),
    ("POST", "/v1/nothing", 404),
    ("GET", "/v1/", 404),
    ("GET", "//v1/models", 404),
    ("GET", "/v1/%2e%2e/etc/passwd", 404),
    ("GET", CHAT, 405),
    ("OPTIONS", CHAT, 405),
    ("DELETE", "/v1/models", 405),
    ("PATCH", "/", 405),
    ("POST", "/health", 405),
    ("PROPFIND", TEXT, 405),
    ("GET", "/v1/../etc/passwd", 404),
    ("GET", "/v1", 404),
    ("GET", "/health/", 404),
    ("GET", "/metrics/../health/x", 404),
    ("GET", "/%00", 404),
    ("GET", "/v1/models/", 404),
    ("GET", "/v1/models/gpt-4o", 404),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v1/chat/completions/", 404),
    ("POST", "/v1/chat/completions%20", 404),
    ("POST", "/v1/embeddings", 404),
    ("POST", "/v1/responses", 404),
    ("GET", "/docs", 404),
    ("GET", "/" + "a" * 10_000, 404),
    ("GET", "/admin", 404),
    ("PUT", CHAT, 405),
    ("TRACE", "/health", 405),
    ("POST", "/metrics", 405),
]
NO_HTTP: list[bytes] = [
    b"nonsense\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\r\n\r\n\r\n GET\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: five\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"G" * 100_000 + b" / HTTP/1.1\r\n\r\n",
]
"""bytes that are no HTTP request"""

OTHERS: list[tuple[str, dict[str, str], bytes, int]] = [
    (CHAT, {"Content-Type": "text/plain"}, b"{}", 415),
    (CHAT, {"Content-Type": ""}, b"{}", 415),
    (CHAT, {"Content-Type": "application/x-www-form-urlencoded"}, b"prompt=why", 415),
    (CHAT, {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 415),
    (CHAT, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"{}", 415),
    (CHAT, {"Content-Type": "application/json", "Content-Encoding": "br"}, b"{}", 415),
    (CHAT, {"Content-Type": "application/json"}, b"[" + b" " * (8 * 2**20) + b"]", 413),
    (TEXT, {"Content-Type": "application/json", "Host": "evil.example"}, b"{}", 403),
    (TEXT, {"Content-Type": "application/json", "Host": "localhost:1:2"}, b"{}", 403),
    (TEXT, {"Content-Type": "application/json"} | {f"X-{i}": "a" for i in range(300)}, b"{}", 431),
]
"""path, headers, body, status"""


class Answer(NamedTuple):
    """What a malformed request was told. ``wanted``: the status that it should have been."""

    name: str
    status: int
    wanted: int
    shaped: bool


def ask_all(url: str) -> Iterator[Answer]:
    """Sends every one of them, about 350, to a server with a context of 256."""
    for number, (fields, param) in enumerate(CHAT_FIELDS):
        yield _answer(f"chat {number} {param}", 400, chat(url, **fields))
    for number, (fields, param) in enumerate(TEXT_FIELDS):
        yield _answer(f"text {number} {param}", 400, complete(url, **fields))
    for name in sorted(UNSUPPORTED):
        yield _answer(f"unsupported {name}", 400, chat(url, **{name: [{"something": "asked"}]}))
    for number, body in enumerate(BODIES):
        yield _answer(f"body {number}", 400, post(url, CHAT, body))
    for method, path, status in ROUTES:
        yield _answer(f"route {method} {path[:40]}", status, httpx2.request(method, url + path, timeout=60))
    for number, data in enumerate(NO_HTTP):
        head, _, body = raw(url, data).partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        headers = {"Content-Type": "application/json"}
        yield _answer(f"no HTTP {number}", 400, httpx2.Response(status, content=body, headers=headers))
    for number, (path, headers, body, status) in enumerate(OTHERS):
        response = httpx2.post(url + path, content=body, headers=headers, timeout=60)
        yield _answer(f"other {number} {path}", status, response)


def _answer(name: str, wanted: int, response: httpx2.Response) -> Answer:
    try:
        error_of(response)
        shaped = True
    except (AssertionError, ValueError):
        shaped = False
    return Answer(name, response.status_code, wanted, shaped)
