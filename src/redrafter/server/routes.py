"""The routes: each reads a request, asks the service and answers."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from redrafter import __version__
from redrafter.errors import NonFiniteLogits
from redrafter.server import payloads
from redrafter.server.answers import Answers
from redrafter.server.body import parse, read_body
from redrafter.server.errors import bad_request, json_response, unavailable
from redrafter.server.logs import LOGGER
from redrafter.server.metrics import CONTENT_TYPE
from redrafter.server.openapi import document
from redrafter.server.outcome import as_api_error
from redrafter.server.page import Page, page
from redrafter.server.payloads import Shape
from redrafter.server.schemas import ChatRequest, CompletionRequest
from redrafter.server.service import Service
from redrafter.server.stream import EventStream, StreamOptions, Writer, until_disconnect


def routes(service: Service) -> list[Route]:
    handlers = Handlers(service)
    return [
        Route("/", handlers.page, methods=["GET"]),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.completions, methods=["POST"]),
        Route("/v1/models", handlers.models, methods=["GET"]),
        Route("/v1/models/{model:path}", handlers.model, methods=["GET"]),
        Route("/v1/redrafter/info", handlers.info, methods=["GET"]),
        Route("/health", handlers.health, methods=["GET"]),
        Route("/ready", handlers.ready, methods=["GET"]),
        Route("/metrics", handlers.metrics, methods=["GET"]),
        Route("/openapi.json", handlers.openapi, methods=["GET"]),
    ]


class Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, self._service.settings.body_timeout)
        return await self._answer(request, parse(body, ChatRequest, self._service.unknown))

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, self._service.settings.body_timeout)
        return await self._answer(request, parse(body, CompletionRequest, self._service.unknown))

    async def _answer(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        chat = isinstance(asked, ChatRequest)
        if asked.stream_options is not None and not asked.stream:
            raise bad_request("stream_options is for streams: set stream to true", "stream_options")
        state = request.scope["state"]
        shape = Shape.of(chat, self._service.settings.model_name, self._service.llm.tokenizer)
        held = AsyncExitStack()
        opened = held.enter_async_context(self._service.answers(asked, shape.request_id, state.get("salt")))
        try:
            answers = await until_disconnect(request.receive, opened)
            held.callback(self._record, answers, state["facts"])
            if asked.stream:
                options = asked.stream_options
                usage = options is not None and bool(options.include_usage)
                stream = StreamOptions(
                    include_usage=usage,
                    continuous_usage=options is not None and bool(options.continuous_usage_stats),
                    details=request.headers.get("x-redrafter-details") == "1",
                )
                writer = Writer(shape, stream, self._service.settings)
                return EventStream(answers, held.pop_all(), writer, self._service.settings)
            await until_disconnect(request.receive, answers.finish())
        finally:
            await held.aclose()
        return self._whole(answers, shape)

    def _whole(self, answers: Answers, shape: Shape) -> Response:
        completions = [completion for completion in answers.completions if completion is not None]
        for completion in completions:
            error = as_api_error(completion)
            if error is not None:
                raise error
        body: dict[str, Any] = {
            **shape.head(chunk=False),
            "choices": [shape.choice(index, completion) for index, completion in enumerate(completions)],
            "usage": payloads.usage(answers),
        }
        metrics = payloads.request_metrics(answers, self._service.settings.request_metrics)
        return json_response(body if metrics is None else {**body, "metrics": metrics})

    def _record(self, answers: Answers, facts: dict[str, Any]) -> None:
        """Metrics and the log line of a request that is over."""
        self._service.metrics.record(answers)
        done = answers.completions
        facts["prompt_tokens"] = answers.prompt_tokens
        facts["answer_tokens"] = sum(stats.answer_tokens for stats in answers.statistics)
        facts["finish_reasons"] = ["cancelled" if c is None else c.finish_reason for c in done]
        for completion in done:
            if completion is None or completion.error is None:
                continue
            LOGGER.error("an answer failed", extra={"fields": {**facts, "error": str(completion.error)}})
            if isinstance(completion.error, NonFiniteLogits):
                self._service.metrics.corrupt()

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["model"])
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.settings.model_name,
            "object": "model",
            "created": service.started,
            "owned_by": "redrafter",
            "max_model_len": service.llm.engine.context_limit,
        }

    async def info(self, request: Request) -> Response:
        service = self._service
        return json_response(
            {
                "model": service.settings.model_name,
                "drafter": service.llm.drafter,
                "config": asdict(service.llm.engine.config),
                "context": service.llm.engine.context_limit,
                "max_batch": service.llm.engine.max_batch,
                "version": __version__,
            }
        )

    async def health(self, request: Request) -> Response:
        """Alive? ``deep=1``: does the model still say something?"""
        worker, limit = self._service.worker, self._service.settings.stall_timeout
        if not worker.alive:
            raise unavailable(f"the engine has stopped: {worker.failure or 'it is not running'}")
        if worker.stalled_seconds > limit:
            raise unavailable(f"one step of the engine has been running for more than {limit:g} seconds")
        if request.query_params.get("deep") == "1":
            await self._service.say_something()
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._service.draining or not self._service.worker.alive:
            raise unavailable("not ready: the server is shutting down or its engine has stopped")
        return json_response({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        text = await asyncio.get_running_loop().run_in_executor(None, self._service.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return json_response(document())

    async def page(self, request: Request) -> Response:
        html, policy = _page()
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy, **PAGE_HEADERS})


PAGE_HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


@cache
def _page() -> Page:
    return page()
