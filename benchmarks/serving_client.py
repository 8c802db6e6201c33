"""Streams at once from one thread, with as little work as a client can do: what is timed is the server.

Requests are bytes before the clock starts and answers are looked into after it stops. The connections are open by
then, as those of a client's pool are.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATIENCE = 600.0
"""seconds without a byte from any stream"""
END = b"\r\n0\r\n\r\n"
"""of a chunked answer"""


class Streams(NamedTuple):
    seconds: float
    """from the first request's first byte to the last answer's last"""
    ends: list[dict[str, Any]]
    """the last event of each, with its usage"""


def ask_at_once(url: str, bodies: Sequence[dict[str, Any]]) -> Streams:
    """SystemExit: a request was refused or an answer failed."""
    address = urlsplit(url)
    requests = [_request(address.netloc, body) for body in bodies]
    with ExitStack() as opened, selectors.DefaultSelector() as selector:
        sockets = [opened.enter_context(socket.create_connection((address.hostname, address.port))) for _ in bodies]
        received: dict[socket.socket, list[bytes]] = {connection: [] for connection in sockets}
        for connection in sockets:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ)
        began = time.perf_counter()
        for connection, request in zip(sockets, requests, strict=True):
            connection.sendall(request)
        while selector.get_map():
            ready = selector.select(PATIENCE)
            if not ready:
                raise SystemExit(f"the server said nothing for {PATIENCE:g} seconds")
            for key, _ in ready:
                connection = key.fileobj
                data = connection.recv(2**16)
                received[connection].append(data)
                if not data or b"".join(received[connection][-2:]).endswith(END):
                    selector.unregister(connection)
        seconds = time.perf_counter() - began
    return Streams(seconds, [_last_event(b"".join(parts)) for parts in received.values()])


def _request(host: str, body: dict[str, Any]) -> bytes:
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({**body, **extra}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _last_event(answer: bytes) -> dict[str, Any]:
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].decode()
    if " 200 " not in status:
        raise SystemExit(f"the server answered {status}: {rest[:500].decode(errors='replace')}")
    events = [line for line in b"".join(_chunks(rest)).split(b"\n") if line.startswith(b"data: {")]
    last: dict[str, Any] = json.loads(events[-1].removeprefix(b"data: ")) if events else {}
    if not isinstance(last.get("usage"), dict):
        raise SystemExit(f"an answer failed: {last}")
    return last


def _chunks(data: bytes) -> Iterator[bytes]:
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        yield data[:length]
        data = data[length + 2 :]
