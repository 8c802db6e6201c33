"""The process: sockets, signals, draining. uvicorn speaks HTTP; its own error pages are put into our shape."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from redrafter.errors import InvalidRequest
from redrafter.llm import LLM
from redrafter.load import settle_memory
from redrafter.server.app import build
from redrafter.server.errors import ApiError, unavailable
from redrafter.server.service import Service
from redrafter.server.settings import MAX_HEADERS, ServeSettings
from redrafter.server.stream import ABORT

HEADER_TIMEOUT = 20.0
"""seconds from a request's first byte, or a connection's beginning, to its last header"""


BACKLOG = 1024
"""connections that the system holds until they are accepted"""


LINGER = 2.0
"""seconds for which what a refused client still sends is thrown away"""


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with errors in our shape, and no patience for headers that never end."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._refused = False
        self._headers_due: asyncio.TimerHandle | None = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_headers()
        else:
            self._got_headers()
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})  # type: ignore[assignment]
            extensions[ABORT] = self.transport.abort

    def _expect_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)

    def _got_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has headers over the limit."""
        body = msgspec.json.encode(ApiError(400, "this is no valid HTTP request, or its headers are too long").body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        # Closing while the client still sends would take the answer away from it: read on for a moment.
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)


class Server(uvicorn.Server):
    """SIGTERM and Ctrl-C: take no new requests, let the running ones end for ``drain`` seconds, then end them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.stopped_by: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, a signal is not raised again afterwards: a server that was asked to stop has not failed."""
        loop = asyncio.get_running_loop()
        caught = (signal.SIGTERM, signal.SIGINT)
        for number in caught:
            loop.add_signal_handler(number, self.shut_down, number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    def shut_down(self, number: int | None = None) -> None:
        if self.should_exit:
            self.force_exit = number == signal.SIGINT
            return
        self.stopped_by = number
        self.should_exit = self._service.draining = True
        asyncio.get_running_loop().call_later(self._service.settings.drain, self._end_rest)

    def _end_rest(self) -> None:
        self._service.worker.stop(unavailable("the server was shut down before this answer was complete"))


def make_server(llm: LLM, settings: ServeSettings, **options: Any) -> Server:
    """``options``: uvicorn's own, such as ssl_certfile."""
    app, service = build(llm, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_graceful_shutdown=round(settings.drain) + 5,
        **options,
    )
    return Server(config, service)


def bind(settings: ServeSettings) -> socket.socket:
    """A socket of the address that does not listen yet. InvalidRequest: the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InvalidRequest(
            f"port {settings.port} of {settings.host} cannot be used: {reason}; pick another with --port"
        ) from error
    return listener


def serve(
    llm: LLM, settings: ServeSettings, listener: socket.socket, tell: Callable[[str], None], **options: Any
) -> int | None:
    """Serve at a bound socket until a signal; returns its number. ``tell`` hears the address once it can be used."""
    listener.listen(BACKLOG)
    server = make_server(llm, settings, **options)
    port = listener.getsockname()[1]
    host = f"[{settings.host.strip('[]')}]" if ":" in settings.host else settings.host
    scheme = "https" if options.get("ssl_certfile") else "http"
    settle_memory()
    tell(f"{scheme}://{host}:{port}")
    asyncio.run(server.serve(sockets=[listener]))
    return server.stopped_by
