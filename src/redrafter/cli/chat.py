"""``redrafter chat``: a conversation in the terminal, with a model in this process or behind a server."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from redrafter.cli import options as opt
from redrafter.cli.conversation import INTERRUPTED, Conversation, LocalModel, Partner, ServerModel
from redrafter.cli.display import Span, wants_color, writer
from redrafter.client import Client
from redrafter.errors import InvalidRequest, RedrafterError
from redrafter.params import SamplingParams

API_KEY = "REDRAFTER_API_KEY"

HELP = """Talk with a model, here or behind a server. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.

On a terminal, tokens that were drafted and accepted are blue, the model's own are bold orange. Text that is piped in is
one question a line; the first error then ends it.

\b
Examples:
  redrafter chat
  redrafter chat --system "Answer in one sentence." --temperature 0.8 --seed 7
  redrafter chat --model ./my-model --drafter ./my-drafter
  redrafter chat --url http://127.0.0.1:8000
  redrafter chat --url https://models.example --api-key MY_KEY_VARIABLE
  redrafter chat --quiet < questions.txt
"""

COMMANDS = """/reset      forget the conversation
/seed N     seed of the next answers
/temp T     temperature of the next answers; 0 is greedy
/plain      speculation off, or on again: the answers stay the same
/stats      counts and speeds of all answers so far
/save FILE  write the conversation as JSON
/help       this list
/quit       leave
A line that starts with // is a question that starts with /."""


def register(app: typer.Typer) -> None:
    app.command("chat", help=HELP)(chat)


def chat(
    url: Annotated[
        str | None, typer.Option(help="A server instead of a model in this process.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"With --url: the environment variable that holds the key. Default: {API_KEY}.",
            show_default=False,
        ),
    ] = None,
    model: opt.Model = None,
    drafter: opt.Drafter = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    max_context: opt.MaxContext = None,
    threads: opt.Threads = None,
    no_compile: opt.NoCompile = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer, with or without speculation.")] = 0,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    speculation: Annotated[
        bool, typer.Option("--speculation/--no-speculation", help="Draft, or decode plainly.")
    ] = True,
    color: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    quiet: opt.Quiet = False,
) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    in_color = wants_color(color, sys.stdout)
    if url is None:
        if api_key is not None:
            raise InvalidRequest(f"--api-key {api_key} is for a server: add --url, or leave it out")
        partner: Partner = LocalModel(
            opt.load_llm(
                model,
                drafter,
                dtype,
                device,
                max_context,
                backend=backend,
                threads=threads,
                quiet=quiet,
                compile=not no_compile,
            )
        )
    else:
        _refuse_local(
            {"--model": model, "--max-context": max_context, "--threads": threads, "--no-compile": no_compile or None},
            {"--drafter": drafter, "--dtype": dtype, "--device": device, "--backend": backend},
        )
        partner = ServerModel(Client(url, _key(api_key)))
    _Terminal(Conversation(partner, params, system, speculation), in_color, quiet).run()


def _refuse_local(unset: dict[str, object], auto: dict[str, str]) -> None:
    """With --url the server has its model already; an option that would do nothing is an error."""
    given = [name for name, value in unset.items() if value is not None]
    given += [name for name, value in auto.items() if value != "auto"]
    if given:
        raise InvalidRequest(f"--url and {given[0]} exclude each other: the server has chosen its model; drop one")


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable or API_KEY)
    if variable is not None and not key:
        raise InvalidRequest(f"--api-key {variable}: there is no such environment variable; set it to the key")
    return key or None


class _Terminal:
    """Reads questions and commands, shows answers. Answers go to stdout, everything else to stderr."""

    def __init__(self, conversation: Conversation, color: bool, quiet: bool) -> None:
        self._conversation = conversation
        self._write = writer(sys.stdout, color)
        self._quiet = quiet
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        if self._interactive and not self._quiet:
            self._tell(f"{self._conversation.partner.name}; /help lists commands, Ctrl-D leaves")
        for line in self._lines():
            try:
                if not self._act(line):
                    return
            except RedrafterError as error:
                if not self._interactive:
                    raise
                self._tell(f"error: {' '.join(str(error).split())}")

    def _act(self, line: str) -> bool:
        """Do what a line says; False if it is time to leave."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].split(maxsplit=1))
        self._ask(line[1:] if line.startswith("//") else line)
        return True

    def _ask(self, question: str) -> None:
        written = False

        def write(spans: Iterable[Span]) -> None:
            nonlocal written
            written = written or bool(spans)
            self._write(spans)

        try:
            tally, reason = self._conversation.ask(question, write)
        finally:
            if written:
                print(flush=True)
        if reason == "interrupted":
            if not self._interactive:
                raise typer.Exit(INTERRUPTED)
            self._tell("stopped")
        if not self._quiet:
            self._tell(tally.line())
            if reason == "length":
                self._tell("the answer was cut: --max-new-tokens, or the context is full (/reset empties it)")

    def _command(self, name: str = "", rest: str = "") -> bool:
        conversation = self._conversation
        match name, rest.strip():
            case "quit", "":
                return False
            case "help", "":
                self._tell(COMMANDS)
            case "reset", "":
                conversation.reset()
                self._say("the conversation is empty")
            case "plain", "":
                conversation.speculation = not conversation.speculation
                self._say("speculation is " + ("on" if conversation.speculation else "off"))
            case "stats", "":
                self._tell(f"answers: {conversation.total.answers}; {conversation.total.line()}")
            case "seed", value if value:
                conversation.set(seed=_number("/seed", value, int))
                self._say(f"seed {conversation.params.seed}")
            case "temp", value if value:
                conversation.set(temperature=_number("/temp", value, float))
                self._say(f"temperature {conversation.params.temperature:g}")
            case "save", value if value:
                conversation.save(Path(value).expanduser())
                self._say(f"saved {value}")
            case _:
                raise InvalidRequest(f"/{name} {rest}".rstrip() + " is no command as it stands: /help lists them")
        return True

    def _lines(self) -> Iterator[str]:
        """Lines that are not blank, from the terminal with a prompt and editing, or from a pipe."""
        if not self._interactive:
            yield from filter(str.strip, _piped())
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history for input(), where there is one
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self._tell("\nCtrl-D or /quit leaves")
                continue
            except EOFError:
                self._tell("")
                return
            if line.strip():
                yield line

    def _read(self) -> str:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # the answers go elsewhere; the prompt should not
        return input()

    def _say(self, words: str) -> None:
        if not self._quiet:
            self._tell(words)

    def _tell(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"line {number} of standard input is not UTF-8: convert it") from error


def _number(command: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidRequest(f"{command} {text} is no number: for example {command} 1") from error
