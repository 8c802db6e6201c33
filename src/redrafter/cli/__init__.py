"""The command line: one module per command, each with ``register(app)``; nothing heavy is imported before its use."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from redrafter import __version__
from redrafter.errors import RedrafterError

COMMANDS = ("generate", "chat", "serve", "bench", "data", "train", "eval", "card", "doctor")
"""Modules of this package, in the order of ``--help``."""

INTERRUPTED = 130

# Recent typer carries its own click, older ones use the installed one; this finds the base of usage errors in both.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def build() -> typer.Typer:
    """The application with every command in it."""
    app = typer.Typer(
        name="redrafter",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for name in COMMANDS:
        importlib.import_module(f"redrafter.cli.{name}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns 0, 1 (it failed), 2 (it was not well asked for) or 130 (Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in options
    if debug:
        given.remove("--debug")
    try:
        code = int(build()(args=given, prog_name="redrafter", standalone_mode=False) or 0)
    except RedrafterError as error:
        return _fail(str(error), error.exit_code, debug)
    except _ClickError as error:
        return _fail(f"{error.format_message()} (see --help)", error.exit_code, debug)
    except OSError as error:
        return _fail(str(error), 1, debug)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"redrafter {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Exact speculative decoding with a recurrent drafter: the same tokens from the same model, sooner."""
