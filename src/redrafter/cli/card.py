"""``redrafter card``: the model card of a drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HELP = """Write README.md beside the drafter in RUN (a run folder, or a drafter's own): data, settings, metrics, limits.

\b
Examples:
  redrafter card run
  redrafter card run --eval mt.json --generation data/manifest.json
"""


def register(app: typer.Typer) -> None:
    app.command("card", help=HELP)(card)


def card(
    run: Annotated[Path, typer.Argument(help="Run folder or drafter folder.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", help="JSON of redrafter eval; may be repeated.")
    ] = None,
    generation: Annotated[Path | None, typer.Option(help="manifest.json of the data.", show_default=False)] = None,
) -> None:
    from redrafter.train.card import write_card

    print(write_card(run, evaluation or [], generation))
