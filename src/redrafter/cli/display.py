"""What a person sees: coloured answer text and the lines of statistics."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TextIO

from redrafter.errors import InvalidRequest

if TYPE_CHECKING:
    from redrafter.engine import RequestStatistics

# Blue against vermilion is told apart with every common colour blindness; bold says the same without colour.
DRAFTED = "#2f8fd8"
OWN = "bold #d55e00"

# On a terminal a model's text must not be able to move the cursor or set the clipboard: controls become pictures.
_CONTROLS = {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Span(Protocol):
    """A stretch of an answer and whether the drafter proposed it: a ``text.Piece``, or a ``client.Span``."""

    @property
    def text(self) -> str: ...

    @property
    def drafted(self) -> bool: ...


def wants_color(choice: str, out: TextIO) -> bool:
    """--color: always, never, or auto: a terminal that can and ``NO_COLOR`` unset (no-color.org)."""
    if choice not in ("auto", "always", "never"):
        raise InvalidRequest(f"--color {choice!r} is unknown: use auto, always or never")
    if choice == "auto":
        return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


def writer(out: TextIO, color: bool) -> Callable[[Iterable[Span]], None]:
    """A function that writes pieces of an answer at once; without colour and terminal, exactly as they are."""
    terminal = out.isatty()
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")  # an answer must not end because the terminal cannot show a character
    paint = _painter(out) if color else None

    def shown(piece: Span) -> str:
        text = piece.text.translate(_CONTROLS) if terminal or paint else piece.text
        return paint(text, piece.drafted) if paint else text

    def write(pieces: Iterable[Span]) -> None:
        out.write("".join(map(shown, pieces)))
        out.flush()

    return write


def _painter(out: TextIO) -> Callable[[str, bool], str]:
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    name = Console(file=out, force_terminal=True, no_color=False).color_system or "standard"
    system = {"256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}.get(name, ColorSystem.STANDARD)
    styles = {True: Style.parse(DRAFTED), False: Style.parse(OWN)}
    return lambda text, drafted: styles[drafted].render(text, color_system=system)


def statistics_lines(statistics: RequestStatistics) -> list[str]:
    """One line on the speed and, if anything was drafted, one on the speculation."""
    s = statistics
    lines = [
        f"{s.answer_tokens} tokens in {s.seconds:.2f} s, {s.tokens_per_second:.1f} tok/s, "
        f"{s.tokens_per_step:.2f} tokens per step (bonus counted), first token after {s.first_token_seconds:.2f} s"
    ]
    if s.drafted_steps:
        depths = " ".join(f"{share:.2f}" for share in s.acceptance_per_depth)
        lines.append(
            f"accepted at depth 1, 2, ...: {depths}; {s.tree_nodes / s.drafted_steps:.1f} tree nodes per step, "
            f"merging removed {s.removed_share:.0%}"
        )
    return lines
