"""Logs: one JSON object a line on stderr; what a client wrote as a prompt or answer never stands in it."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

LOGGER = logging.getLogger("redrafter.server")


class JsonFormatter(logging.Formatter):
    """``extra={"fields": {...}}`` of a record becomes keys of the line. JSON escapes control characters."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def to_stderr(level: str) -> None:
    """Send this server's and uvicorn's logs to stderr as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("redrafter.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
