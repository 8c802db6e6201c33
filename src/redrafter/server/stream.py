"""Answers as server-sent events, and the watch for a client that goes away or does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from redrafter.server import payloads
from redrafter.server.answers import Answers, Part
from redrafter.server.outcome import as_api_error
from redrafter.server.payloads import Shape
from redrafter.server.quiet import Quiet
from redrafter.server.settings import ServeSettings

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
ABORT = "redrafter.abort"
"""ASGI extension: drops the connection with what was not sent yet (``run.Protocol``)"""
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    include_usage: bool = False
    continuous_usage: bool = False
    details: bool = False


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; it is cancelled and ClientDisconnect raised when the client goes away first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Writes the chunks of running answers; ``held`` closes with the stream, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, held: AsyncExitStack, writer: Writer, settings: ServeSettings) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers = answers
        self._held = held
        self._writer = writer
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await until_disconnect(receive, self._write(send))
            except ClientDisconnect:
                scope["state"]["facts"]["client"] = "left"
            except TimeoutError:
                scope["state"]["facts"]["client"] = "did not read"
                scope.get("extensions", {}).get(ABORT, _nothing)()

    async def _write(self, send: Send) -> None:
        """TimeoutError: the client took nothing for ``send_timeout`` seconds while there was something to send."""
        sending = False

        def ring() -> None:
            if sending:
                limit.reschedule(asyncio.get_running_loop().time())

        async with asyncio.timeout(None) as limit:
            quiet = Quiet(self._settings.send_timeout, ring)
            try:
                async for data in self._writer.events(self._answers, self._settings.keep_alive):
                    quiet.heard()
                    sending = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    sending = False
            finally:
                quiet.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _nothing() -> None:
    return None


class Writer:
    """One request's chunks as bytes."""

    def __init__(self, shape: Shape, options: StreamOptions, settings: ServeSettings) -> None:
        self._shape = shape
        self._options = options
        self._detail = settings.request_metrics
        self._head = shape.head(chunk=True)

    async def events(self, answers: Answers, patience: float) -> AsyncIterator[bytes]:
        if self._shape.chat:
            for index in range(len(answers.completions)):
                yield self._chunk(answers, [self._shape.delta(index, None, role=True)])
        async for part in answers.parts(patience):
            if part is None:
                yield KEEP_ALIVE
                continue
            completion = part.chunk.completion
            error = None if completion is None else as_api_error(completion)
            if error is not None:
                yield b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
                break
            if (data := self._part(answers, part)) is not None:
                yield data
            if completion is not None:
                yield self._chunk(answers, [self._shape.delta(part.answer, None, completion.finish_reason)])
        else:
            if self._options.include_usage:
                yield self._last(answers)
        yield DONE

    def _part(self, answers: Answers, part: Part) -> bytes | None:
        """A step's chunk; None if it has nothing to say."""
        if not part.chunk.text and not part.chunk.logprobs and not self._options.details:
            return None
        details = payloads.details(part, self._shape.names) if self._options.details else None
        return self._chunk(answers, [self._shape.delta(part.answer, part)], details)

    def _chunk(self, answers: Answers, choices: list[Any], details: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self._options.continuous_usage:
            body["usage"] = payloads.usage(answers)
        elif self._options.include_usage:
            body["usage"] = None
        if details is not None:
            body["redrafter"] = details
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _last(self, answers: Answers) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": [], "usage": payloads.usage(answers)}
        metrics = payloads.request_metrics(answers, self._detail)
        if metrics is not None:
            body["metrics"] = metrics
        return b"data: " + msgspec.json.encode(body) + b"\n\n"
