"""What to ask: a JSONL file, or a dozen questions of our own; and which of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.errors import InvalidRequest

if TYPE_CHECKING:
    from redrafter.llm import Prompt

BUILT_IN_NAME = "built-in"
BUILT_IN = (
    ("writing", "Write a short letter to a neighbour, asking to borrow a ladder for the weekend."),
    ("writing", "Describe a harbour town early on a foggy morning in about 150 words."),
    ("coding", "Write a Python function that merges two sorted lists into one sorted list, with a docstring."),
    ("coding", "Explain what an SQL index is and give an example of creating one."),
    ("math", "A train covers 180 km in 2.5 hours. How far does it go in 4 hours at the same speed? Show each step."),
    (
        "reasoning",
        "Anna is older than Ben, and Carla is younger than Ben. Who is the youngest? Explain your reasoning.",
    ),
    (
        "extraction",
        "List every name and every amount in this note, one per line: Lena paid 40 euros for paint, Omar paid 15 euros "
        "for brushes, and Lena owes Priya 12 euros for tape.",
    ),
    (
        "summarization",
        "Summarise in two sentences: Bees find a new home by sending scouts. A scout that likes a place dances for it "
        "when it comes back; the better the place, the longer the dance. Others go and look, and dance in turn. When "
        "enough scouts agree on one place, the whole swarm flies there.",
    ),
    ("translation", "Translate into Spanish: The library opens at nine, and the bus stops in front of it."),
    ("qa", "Why does bread rise in the oven?"),
    ("roleplay", "You are the keeper of a lighthouse. Tell a visiting child what you do on a stormy night."),
    ("planning", "Plan three days in a city by the sea for a family with two small children. Use a list for each day."),
)


@dataclass(frozen=True)
class BenchPrompt:
    id: str
    category: str
    prompt: Prompt

    @property
    def group(self) -> str:
        """The category's first part: ``mt_bench`` of ``mt_bench/writing``."""
        return self.category.partition("/")[0]


@dataclass(frozen=True)
class PromptSet:
    """Prompts and where they came from: a file's name as it was given, SHA-256 of the whole file, lines in it."""

    name: str
    sha256: str
    total: int
    prompts: tuple[BenchPrompt, ...]


def load_prompts(path: Path | None) -> PromptSet:
    """The prompts of a JSONL file, or the built-in ones. InvalidRequest names the line that is not understood.

    A line is an object with one of ``prompt`` (text), ``messages`` (a conversation), ``turns`` (the first is asked);
    ``id`` and ``category`` are optional.
    """
    if path is None:
        built_in = [{"id": f"b{i:02}", "category": c, "prompt": p} for i, (c, p) in enumerate(BUILT_IN, 1)]
        lines = [json.dumps(entry) for entry in built_in]
        data = "\n".join(lines).encode()
    else:
        try:
            data = path.read_bytes()
            lines = data.decode("utf-8").split("\n")  # JSON may hold U+2028, which splitlines() splits at
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"--prompts {path} cannot be read as UTF-8 text ({error}): name a JSONL file"
            ) from error
    name = BUILT_IN_NAME if path is None else str(path)
    prompts = tuple(_parse(line, name, number) for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise InvalidRequest(f"--prompts {name} has 0 prompts: it must have at least one line")
    return PromptSet(name, hashlib.sha256(data).hexdigest(), len(prompts), prompts)


def _parse(line: str, name: str, number: int) -> BenchPrompt:
    where = f"{name} line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not JSON ({error}): write one object per line") from error
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{where} is a JSON {type(entry).__name__}: write one object per line")
    return BenchPrompt(str(entry.get("id", number)), str(entry.get("category", "none")), _asked(entry, where))


def _asked(entry: dict[str, Any], where: str) -> Prompt:
    turns = entry.get("turns")
    text = turns[0] if isinstance(turns, list) and turns else entry.get("prompt")
    if isinstance(text, str) and text:
        return text
    messages = entry.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return messages
    raise InvalidRequest(f"{where} asks nothing: give it a text as prompt, a list as messages, or texts as turns")


def select(found: PromptSet, category: str, limit: int | None, spread: bool) -> list[BenchPrompt]:
    """Those whose category starts with ``category``; of these ``limit``, the first or, spread, evenly spaced ones."""
    chosen = [p for p in found.prompts if p.category.startswith(category)]
    if not chosen:
        known = ", ".join(sorted({p.category for p in found.prompts}))
        raise InvalidRequest(f"--category {category!r} fits 0 of {found.total} prompts: use one of {known}")
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i * len(chosen) // limit] for i in range(limit)] if spread else chosen[:limit]


def groups_of(prompts: Sequence[BenchPrompt]) -> list[str]:
    """The first parts of the categories, sorted."""
    return sorted({p.group for p in prompts})
