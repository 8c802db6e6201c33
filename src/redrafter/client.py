"""A client of a server that speaks OpenAI's chat completions. The standard library only, so that it starts at once."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from redrafter.errors import InvalidRequest, ServerFailed


class Span(NamedTuple):
    """A stretch of text and whether the drafter proposed the token that completed it."""

    text: str
    drafted: bool


class StreamEvent(NamedTuple):
    """One event of a streamed answer. tokens: what its step brought, 0 if the event is no step."""

    spans: tuple[Span, ...]
    tokens: int
    finish_reason: str | None
    answer_tokens: int | None
    """the whole answer's tokens, in the event that carries the usage"""


class Client:
    """url: where the server is, with or without ``/v1``. timeout: seconds of silence that count as a failure.

    Every method raises ServerFailed if the server does not answer, or refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 120.0) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise InvalidRequest(f"--url {url!r}: {error}; for example http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"--url {url!r} is no address of a server: for example http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._address = (parts.hostname, port)
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "X-Redrafter-Details": "1"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise InvalidRequest("the API key has characters that no header can carry: copy it again")
            self._headers["Authorization"] = f"Bearer {api_key}"

    def model(self) -> str:
        """The name of the first model of the server."""
        with self._response("GET", "/v1/models") as response:
            try:
                return _clean(json.loads(response.read())["data"][0]["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise ServerFailed(f"{self.url} names no model at /v1/models: is it a chat server?") from error

    def stream(self, body: Mapping[str, Any]) -> Iterator[StreamEvent]:
        """A chat completion as it comes. Closing the iterator closes the connection, which cancels the request."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._response("POST", "/v1/chat/completions", asked) as response:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data and line.startswith(b"data:"):
                    event = self._event(data)
                    yield event
                    if event.finish_reason == "error":
                        raise ServerFailed(f"{self.url} failed in the middle of the answer: its log says why")
        raise ServerFailed(f"{self.url} ended the connection before the answer: ask again")

    def _event(self, data: bytes) -> StreamEvent:
        try:
            event = json.loads(data)
            if event.get("error"):
                raise ServerFailed(f"{self.url} broke the answer off: {_clean(event['error']['message'])}")
            choice = event["choices"][0] if event.get("choices") else {}
            text = choice.get("delta", {}).get("content") or ""
            details = event.get("redrafter")
            # Servers that tell nothing of drafting send text only: then an event counts as one token.
            spans = tuple(Span(str(t), bool(d)) for t, d in details["spans"]) if details else (Span(text, False),)
            step = details["step"] if details else {"accepted": 0} if text else None
            return StreamEvent(
                spans=tuple(span for span in spans if span.text),
                tokens=int(step["accepted"]) + 1 if step else 0,
                finish_reason=choice.get("finish_reason"),
                answer_tokens=(event.get("usage") or {}).get("completion_tokens"),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerFailed(
                f"{self.url} sent an event that is no chat completion: {_clean(str(data[:80]))}"
            ) from error

    @contextmanager
    def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        host, port = self._address
        connection = self._connect(host, port, timeout=self._timeout)
        try:
            connection.request(method, self._base + path, json.dumps(body) if body else None, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ServerFailed(self._refusal(response))
            yield response
        except TimeoutError as error:
            raise ServerFailed(
                f"{self.url} said nothing for {self._timeout:g} s: is it stuck or overloaded?"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{self.url} does not answer ({error}): is a server running there?") from error
        finally:
            connection.close()

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        try:
            said = _clean(json.loads(response.read(2**16))["error"]["message"])
        except (ValueError, LookupError, TypeError):
            said = response.reason
        wait = response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "soon"
        match response.status:
            case 401:
                return f"{self.url} wants an API key ({said}): name the variable that holds it with --api-key"
            case 429:
                return f"{self.url} had too many requests with this key: try again {when}"
            case 503:
                return f"{self.url} is busy: try again {when}"
        return f"{self.url} answered {response.status}: {said}"


def _clean(text: object) -> str:
    """A server's words for a terminal: no control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:500]
