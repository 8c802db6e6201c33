"""What an answer that failed means to its client."""

from __future__ import annotations

from redrafter.errors import NonFiniteLogits, OutOfMemory
from redrafter.reply import Completion
from redrafter.server.answers import SlowReader
from redrafter.server.errors import ApiError, overloaded


def as_api_error(completion: Completion) -> ApiError | None:
    """None: it went well, or the finish reason "error" says enough (the model's numbers failed after some text)."""
    error = completion.error
    if error is None or isinstance(error, ApiError):
        return error
    if isinstance(error, NonFiniteLogits):
        return None
    if isinstance(error, OutOfMemory):
        return overloaded("there is no memory left for this request: try again, or ask for fewer tokens")
    if isinstance(error, SlowReader):
        return ApiError(408, str(error), code="slow_reader")
    return ApiError(500, "the engine failed on this request: see the server's log", code="engine_error")
