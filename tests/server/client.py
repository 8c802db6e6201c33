"""What the tests of the server ask with: JSON, server-sent events, raw sockets."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2

MESSAGES = [{"role": "user", "content": "why?"}]


def post(url: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
    """``body``: JSON, or bytes to be sent as they are."""
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(url + path, content=content, headers=headers, timeout=60, **options)


def chat(url: str, **fields: Any) -> httpx2.Response:
    return post(url, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, "seed": 1, **fields})


def complete(url: str, **fields: Any) -> httpx2.Response:
    return post(url, "/v1/completions", {"prompt": "why", "max_tokens": 8, "seed": 1, **fields})


def events(response: httpx2.Response) -> list[Any]:
    """The data of a whole stream, checked for its framing; the closing [DONE] is left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error in a response, which has OpenAI's shape and nothing else."""
    assert response.status_code >= 400
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]


def raw(url: str, data: bytes, timeout: float = 20.0) -> bytes:
    """Everything that a server says to ``data`` until it closes the connection."""
    with dial(url, timeout) as connection:
        connection.sendall(data)
        said = b""
        while part := connection.recv(65536):
            said += part
    return said


def receive_until(connection: socket.socket, wanted: bytes) -> bytes:
    """What the server says up to the part in which ``wanted`` comes."""
    said = b""
    while wanted not in said:
        part = connection.recv(65536)
        assert part, f"the server closed the connection after {said!r}"
        said += part
    return said


def dial(url: str, timeout: float = 20.0) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout)


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A POST as it goes over the wire."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content
