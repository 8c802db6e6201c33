"""What stands before every route: header limits, the Host, the key, a request id, a log line; errors in one shape."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redrafter.server.errors import ApiError
from redrafter.server.logs import LOGGER
from redrafter.server.settings import MAX_HEADER_LINES, MAX_HEADERS

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key: they tell nothing but yes or no."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d{1,5}$")


class Keys:
    """API keys as SHA-256 digests. Every key is compared, so the time tells nothing about which was close."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def salt_of(self, headers: dict[bytes, bytes]) -> str | None:
        """A stable name of the key in ``headers`` that does not give it away; None: no valid key."""
        given = hashlib.sha256(_given_key(headers)).digest()
        found = None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = hashlib.sha256(b"redrafter salt " + digest).hexdigest()[:16]
        return found


def _given_key(headers: dict[bytes, bytes]) -> bytes:
    """Bearer token, X-Api-Key, or the password of Basic, which is what a browser can ask a person for."""
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return headers.get(b"x-api-key", b"").strip()


class Guard:
    def __init__(self, app: ASGIApp, keys: Keys, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        facts: dict[str, Any] = {"request_id": asked if _SAFE_ID.fullmatch(asked) else uuid.uuid4().hex}
        scope.setdefault("state", {})["facts"] = facts
        sender = _Sender(send, facts["request_id"])
        started = time.perf_counter()
        try:
            await self._admit(scope, headers)
            await self._app(scope, receive, sender)
        except ApiError as error:
            await error.response()(scope, receive, sender)
        except ClientDisconnect:
            sender.status = sender.status or 499
        except Exception:  # noqa: BLE001 - whatever it was, this request is answered and the server goes on
            LOGGER.exception("a request failed", extra={"fields": dict(facts)})
            if sender.status is None:
                message = f"the server failed: see its log for request {facts['request_id']}"
                await ApiError(500, message, code="internal").response()(scope, receive, sender)
        finally:
            line = {"method": scope["method"], "path": scope["path"][:200], "status": sender.status, **facts}
            LOGGER.info("request", extra={"fields": {**line, "seconds": round(time.perf_counter() - started, 6)}})

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADERS or len(scope["headers"]) > MAX_HEADER_LINES:
            raise ApiError(431, f"more than {MAX_HEADERS} bytes or {MAX_HEADER_LINES} lines of headers", code="headers")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _PORT.sub("", host) not in self._hosts:
            raise ApiError(403, "this Host is not served: use the server's own address, or --allow-host", code="host")
        open_to_all = scope["path"] in OPEN_PATHS and not scope["query_string"]  # deep=1 makes the model work
        if self._keys and not open_to_all:
            salt = self._keys.salt_of(headers)
            if salt is None:
                scheme = 'Basic realm="redrafter"' if scope["path"] == "/" else "Bearer"
                raise ApiError(
                    401,
                    "no valid API key: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": scheme},
                )
            scope["state"]["salt"] = scope["state"]["facts"]["key"] = salt


class _Sender:
    """``send`` with the headers that every response has; remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = [(b"x-request-id", self._request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await self._send(message)
