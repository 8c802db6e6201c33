"""From a socket's bytes to a checked request: limits first, then JSON, then the schema."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from redrafter.server.errors import ApiError, bad_request
from redrafter.server.schemas import UNSUPPORTED, Common
from redrafter.server.settings import MAX_BODY, MAX_DEPTH

T = TypeVar("T", bound=Common)

_log = logging.getLogger("redrafter.server")
MAX_UNKNOWN = 1000
"""field names remembered; more are ignored without a word"""
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")


async def read_body(request: Request, timeout: float) -> bytes:
    """The whole body, counted while it comes. ApiError 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not read: send it plain", code="unsupported_media_type")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > MAX_BODY:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise _too_large()
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {timeout:g} seconds", code="timeout") from error
    return b"".join(parts)


def _too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MAX_BODY} bytes", code="body_too_large")


def parse(body: bytes, kind: type[T], unknown: set[str]) -> T:
    """The request in ``body``. ApiError 400 names the field; a field nobody knows is ignored, logged once and kept in
    ``unknown``."""
    fields = _decode(body, dict[str, msgspec.Raw])
    if _depth(body) > MAX_DEPTH:
        raise bad_request(f"the JSON is nested more than {MAX_DEPTH} deep: flatten it", code="invalid_json")
    known = kind.__struct_fields__
    for name, raw in fields.items():
        if name in UNSUPPORTED:
            value = _decode(bytes(raw), Any)
            if value is not None and value not in UNSUPPORTED[name]:
                raise bad_request(
                    f"{name} is not supported by this server: leave it out", name, "unsupported_parameter"
                )
        elif name not in known and name not in unknown and len(unknown) < MAX_UNKNOWN:
            unknown.add(name)
            _log.info("unknown request field ignored", extra={"fields": {"field": name[:100]}})
    return _decode(body, kind)


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        missing = re.search(r"missing required field `(\w+)`", text)
        path = found[1] if found else ""
        if missing:
            path = f"{path}.{missing[1]}".strip(".")
        message = _PATH.sub("", text)
        raise bad_request(f"{path}: {message}" if path else message, path or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise bad_request(f"the body is no JSON: {reason}", code="invalid_json") from error


def _depth(body: bytes) -> int:
    """How deep arrays and objects of a valid JSON text are nested."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0
    # Backslashes stand in strings only; without escapes, every quote opens or closes one.
    bare = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
    outside = np.cumsum(bare == ord('"'), dtype=np.uint32) % 2 == 0
    opens = (bare == ord("[")) | (bare == ord("{"))
    closes = (bare == ord("]")) | (bare == ord("}"))
    return int(np.cumsum((opens & outside).astype(np.int8) - (closes & outside), dtype=np.int64).max())
