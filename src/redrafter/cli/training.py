"""What the commands of training share: settings from files and KEY=VALUE, and the way a signal ends them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redrafter.errors import InvalidRequest


def read_settings(config: Path | None, assignments: Sequence[str] | None) -> dict[str, Any]:
    """Settings of a YAML or JSON file, overridden by KEY=VALUE. Values are read as JSON, else they are texts."""
    values: dict[str, Any] = {} if config is None else _read_file(config)
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"--set {assignment!r} is not allowed: write KEY=VALUE")
        values[name.strip()] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_file(path: Path) -> dict[str, Any]:
    import yaml  # transformers brings it

    if path.suffix not in (".json", ".yaml", ".yml"):
        raise InvalidRequest(f"--config {path}: the name must end in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(
            f"--config {path} cannot be read ({error}): give a YAML or JSON file of settings"
        ) from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"--config {path} holds a {type(values).__name__}: give settings as KEY: VALUE")
    return values


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
