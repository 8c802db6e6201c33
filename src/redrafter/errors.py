"""Every error a user can meet. One line each: the value, the limit, the fix."""

from __future__ import annotations


class RedrafterError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InvalidRequest(RedrafterError, ValueError):
    """A setting, prompt or combination of them that cannot be served."""

    exit_code = 2


class ModelNotFound(RedrafterError):
    """No model or drafter under that name."""


class ServerFailed(RedrafterError):
    """A server that does not answer, refuses, or breaks off."""


class CorruptModel(RedrafterError):
    """Files that are missing, truncated, changed, or not what their manifest or configuration says."""


class UnsupportedModel(RedrafterError):
    """An architecture or feature that cannot be run exactly."""


class IncompatibleDrafter(RedrafterError):
    """A drafter that was trained for another target."""


class OutOfMemory(RedrafterError):
    """The key/value cache or the weights do not fit."""


class Overloaded(RedrafterError):
    """More requests wait than the queue holds."""


class RequestFailed(RedrafterError):
    """Something unforeseen while one request's prompt was read; the others go on."""


class NonFiniteLogits(RedrafterError):
    """The target produced NaN or infinite logits for a request."""


class TrainingDiverged(RedrafterError):
    """A loss that is no number."""


def is_out_of_memory(error: BaseException) -> bool:
    """Ours, Python's, or that of a framework, told by its name."""
    return isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError"


def named(request_id: str, error: Exception) -> RedrafterError:
    """What a request whose prompt could not be read is told."""
    if isinstance(error, RedrafterError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"request {request_id!r}: there was no memory to read its prompt: shorten it")
    first_line = (str(error).strip().splitlines() or [""])[0]
    return RequestFailed(f"request {request_id!r}: its prompt was not read: {type(error).__name__} {first_line}")
