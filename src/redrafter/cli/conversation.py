"""A conversation with a model, in this process or behind a server; what its answers cost, by this process's clock."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import typer

from redrafter.client import Client
from redrafter.errors import InvalidRequest
from redrafter.params import SamplingParams

if TYPE_CHECKING:
    from redrafter.cli.display import Span
    from redrafter.llm import LLM

INTERRUPTED = 130
Messages = Sequence[dict[str, str]]


class Heard(NamedTuple):
    """What came at once. tokens: 0 if it was no decoding step; total: the answer's tokens, once they are known."""

    spans: Sequence[Span]
    tokens: int
    finish_reason: str | None = None
    total: int | None = None


class Partner(Protocol):
    """Who answers."""

    name: str

    def answer(self, messages: Messages, params: SamplingParams, speculation: bool) -> Generator[Heard, None, None]:
        """The answer to the last message, as it comes; closing the iterator cancels it."""


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = f"{llm.model} (drafter {llm.drafter or 'none'})"

    def answer(self, messages: Messages, params: SamplingParams, speculation: bool) -> Generator[Heard, None, None]:
        chunks = self._llm.stream(list(messages), params, speculation=speculation)
        with interrupts_wait() as interrupted, contextlib.closing(chunks):  # type: ignore[type-var]
            for chunk in chunks:
                reason = None if chunk.completion is None else chunk.completion.finish_reason
                yield Heard(chunk.spans, len(chunk.token_ids), reason)
                if interrupted():
                    raise KeyboardInterrupt


class ServerModel:
    """The model of a server. Only what the settings change is sent, so that any OpenAI-compatible one will do."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._model = client.model()
        self.name = f"{self._model} at {client.url}"

    def answer(self, messages: Messages, params: SamplingParams, speculation: bool) -> Generator[Heard, None, None]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(messages),
            "temperature": params.temperature,
            "seed": params.seed,
            "max_tokens": params.max_new_tokens,
        }
        for event in self._client.stream(body if speculation else body | {"speculation": False}):
            yield Heard(event.spans, event.tokens, event.finish_reason, event.answer_tokens)


@contextmanager
def interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, which leaves the engine whole; a second one ends the program at once."""
    asked: list[bool] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise typer.Exit(INTERRUPTED)
        asked.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Tally:
    """Counts and times of answers. Rates leave out what the first event brought: nobody saw how long that took."""

    answers: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    """from the question to the first token"""
    decoded: int = 0
    """tokens after the first event's"""
    decoding_seconds: float = 0.0
    """from the first token to the last"""

    def add(self, other: Tally) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def line(self) -> str:
        """One line in words; of several answers, their sums."""
        rate = f"{self.decoded / self.decoding_seconds:.1f}" if self.decoding_seconds > 0 else "-"
        steps = f"{self.tokens / self.steps:.2f}" if self.steps else "-"
        first = f"{self.first_seconds / self.answers:.2f}" if self.answers else "-"
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s, {rate} tok/s, {steps} tokens per step (bonus counted), "
            f"first token after {first} s"
        )


class Conversation:
    """Turns so far and the settings of the next ones. A question that got no answer is forgotten."""

    def __init__(self, partner: Partner, params: SamplingParams, system: str | None, speculation: bool) -> None:
        self.partner = partner
        self.params = params
        self.speculation = speculation
        self.total = Tally()
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str, write: Callable[[Iterable[Span]], None]) -> tuple[Tally, str]:
        """Write the answer as it comes; its tally, and why it ended; "interrupted" is Ctrl-C.

        What was heard of an answer that broke off stays in the conversation, and so in the total.
        """
        asked = {"role": "user", "content": question}
        tally, reason, said = Tally(answers=1), "unknown", ""
        start = time.perf_counter()
        first = last = None
        heard = self.partner.answer([*self._system, *self.messages, asked], self.params, self.speculation)
        try:
            with contextlib.closing(heard):
                for part in heard:
                    if part.tokens:
                        last = time.perf_counter()
                        tally.steps += 1
                        tally.tokens += part.tokens
                        if first is None:
                            first, first_tokens = last, part.tokens
                    tally.tokens = part.total or tally.tokens
                    reason = part.finish_reason or reason
                    said += "".join(span.text for span in part.spans)
                    write(part.spans)
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            if said:
                self.messages += [asked, {"role": "assistant", "content": said}]
            if first is not None and last is not None:
                tally.first_seconds, tally.decoding_seconds = first - start, last - first
                tally.decoded = tally.tokens - first_tokens
            tally.seconds = time.perf_counter() - start
            self.total.add(tally)
        return tally, reason

    def reset(self) -> None:
        self.messages = []

    def set(self, **values: Any) -> None:
        """Change settings of the next answers; InvalidRequest if a value is not allowed."""
        self.params = replace(self.params, **values)

    def save(self, path: Path) -> None:
        """Write model, settings and messages as one JSON; never over a file that is there."""
        value = {
            "model": self.partner.name,
            "settings": asdict(self.params) | {"speculation": self.speculation},
            "messages": [*self._system, *self.messages],
        }
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be written ({error.strerror}): name another file") from error
