"""The OpenAPI description of the routes, made from the schemas that check the requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from redrafter import __version__
from redrafter.server.schemas import ChatRequest, CompletionRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_DEEP = {
    "name": "deep",
    "in": "query",
    "description": "1: ask the model for one token",
    "schema": {"type": "string"},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Comes back with the answer if it is at most 64 letters, digits, dots, dashes and underscores",
    "schema": {"type": "string"},
}
_DETAILS = {
    "name": "X-Redrafter-Details",
    "in": "header",
    "description": "1: the chunks of a stream tell how each came about",
    "schema": {"type": "string"},
}


@cache
def document() -> dict[str, Any]:
    (chat, completion), components = msgspec.json.schema_components(
        [ChatRequest, CompletionRequest], ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "redrafter", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _operation("Answer a conversation", body=chat, stream=True)},
            "/v1/completions": {"post": _operation("Continue a text", body=completion, stream=True)},
            "/v1/models": {"get": _operation("The model served here")},
            "/v1/models/{model}": {"get": _operation("The model of that name", parameters=[_MODEL])},
            "/v1/redrafter/info": {"get": _operation("Model, drafter and beam shape")},
            "/health": {"get": _operation("Is the engine alive?", parameters=[_DEEP])},
            "/ready": {"get": _operation("Are requests taken?")},
        },
        "components": {"schemas": {**components, "Error": _ERROR}},
    }


def _operation(
    summary: str, *, body: Any = None, stream: bool = False, parameters: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "parameters": [*parameters, _REQUEST_ID, *([_DETAILS] if stream else [])],
        "responses": {
            "200": {"description": "Done", "content": content},
            "4XX": {"description": "The request was wrong", "content": error},
            "503": {"description": "No room, or shutting down: Retry-After says when to come again", "content": error},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
