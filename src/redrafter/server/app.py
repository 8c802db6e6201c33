"""The ASGI application over a loaded model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from redrafter.llm import LLM
from redrafter.server.errors import ApiError, unavailable
from redrafter.server.guard import Guard, Keys
from redrafter.server.routes import routes
from redrafter.server.service import Service
from redrafter.server.settings import ServeSettings


def build(llm: LLM, settings: ServeSettings) -> tuple[ASGIApp, Service]:
    """The application and what runs behind it. The engine's thread lives as long as the application's lifespan."""
    service = Service(llm, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        service.worker.stop(unavailable("the server was shut down"))
        service.texts.close()
        await asyncio.to_thread(service.worker.join, 10.0)

    app = Starlette(
        routes=routes(service),
        lifespan=lifespan,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _unexpected,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, Keys(settings.api_keys), settings.hosts), service


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route here", 405: f"{request.method} is not for this route"}
    message = words.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code="route", headers=error.headers).response()


def _gone(_: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what the log shows."""
    return Response(status_code=499)


def _unexpected(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed: see its log", code="internal").response()
