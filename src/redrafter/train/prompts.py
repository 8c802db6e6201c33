"""Prompts from files and Hub data sets: every format becomes the messages that the target is to answer.

A record is one of
    {"messages": [{"role": "user", "content": ..}, ..]}
    {"conversations": [{"from": "human" | "gpt" | "system", "value": ..}, ..]}       (ShareGPT)
    {"turns": ["first question", ..]}                                                (the first one is asked)
    {"prompt": ".."}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from redrafter.errors import InvalidRequest, ModelNotFound

Message = dict[str, str]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS = ("last", "each")
FORMATS = '"messages", "conversations" (ShareGPT), "turns" or "prompt"'
HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Prompt(NamedTuple):
    """Messages that end with the user's; the target answers them."""

    messages: list[Message]
    category: str = ""


def read_prompts(sources: Iterable[str], turns: str = "last") -> list[Prompt]:
    """All prompts of files and Hub data sets, in their order.

    ``turns``: a conversation is asked once, at its last user turn, or at each of them; what the record says before that
    turn, answers included, is the context. Raises InvalidRequest naming file and line.
    """
    if turns not in TURNS:
        raise InvalidRequest(f"turns={turns!r} is unknown: use {' or '.join(TURNS)}")
    out: list[Prompt] = []
    for source in sources:
        for where, record in _records(source):
            messages = _messages(record, where)
            asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
            if not asked:
                raise InvalidRequest(f"{where}: no user turn; give at least one message of the role user")
            category = str(record.get("category", ""))
            for i in asked if turns == "each" else asked[-1:]:
                out.append(Prompt(messages[: i + 1], category))
    return out


def _records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source).expanduser()
    if path.is_file():
        yield from _lines(path)
    elif HUB_DATASET.fullmatch(source) and not path.exists():
        yield from _hub(source)
    else:
        raise InvalidRequest(
            f"prompts {source!r}: no such file and no Hub data set (owner/name[:split]); check the path"
        )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"{path}:{number}: not JSON ({error}); give one JSON object per line") from error
            if not isinstance(record, dict):
                raise InvalidRequest(f"{path}:{number}: a JSON {type(record).__name__}; give one object per line")
            yield f"{path}:{number}", record


def _hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise InvalidRequest(
            f"prompts {source!r} is a Hub data set, which needs the package datasets: "
            "pip install 'redrafter[train]', or give a JSONL file"
        ) from error
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFound(
            f"data set {source!r} could not be loaded ({reason}); check name, split, network"
        ) from error
    for number, record in enumerate(rows, 1):
        yield f"{source}:{number}", record


def _messages(record: dict[str, Any], where: str) -> list[Message]:
    if "messages" in record:
        return [_message(m, "role", "content", where) for m in _list(record["messages"], where)]
    if "conversations" in record:
        return [_message(m, "from", "value", where) for m in _list(record["conversations"], where)]
    text = record.get("prompt")
    if "turns" in record:
        text = _list(record["turns"], where)[0]
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequest(f"{where}: no prompt found among {', '.join(record) or 'no keys'}; use {FORMATS}")
    return [{"role": "user", "content": text}]


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{where}: expected a list of turns, found {type(value).__name__}; use {FORMATS}")
    return value


def _message(turn: Any, role_key: str, text_key: str, where: str) -> Message:
    role = turn.get(role_key) if isinstance(turn, dict) else None
    text = turn.get(text_key) if isinstance(turn, dict) else None
    if role not in ROLES or not isinstance(text, str):
        raise InvalidRequest(
            f"{where}: a turn with {role_key}={role!r}; use {', '.join(sorted(set(ROLES)))} and a text"
        )
    return {"role": ROLES[role], "content": text}
