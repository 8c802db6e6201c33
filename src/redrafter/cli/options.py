"""Options that several commands share, and the way from them to a loaded model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.params import DecodeConfig, from_mapping

if TYPE_CHECKING:
    from redrafter.llm import LLM

Model = Annotated[
    str | None,
    typer.Option(help="Model: a Hub id, a folder or a GGUF file. Default: smollm2-135m-instruct.", show_default=False),
]
Drafter = Annotated[
    str, typer.Option(help="Drafter: auto (the shipped one for the model), none, or a run or drafter folder.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; with MLX auto, cpu or gpu.")]
Backend = Annotated[str, typer.Option(help="auto (MLX on Apple silicon, else torch), torch or mlx.")]
MaxContext = Annotated[
    int | None, typer.Option(min=2, help="Longest prompt plus answer in tokens.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="GPU: torch's own eager operations, no graphs, no kernels of ours.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no statistics on stderr.")]

# The beam shape changes the speed only. Given none of the four, the program picks it.
BeamWidth = Annotated[int | None, typer.Option(help="Beam shape: beams kept per depth.", show_default=False)]
Branching = Annotated[int | None, typer.Option(help="Beam shape: children scored per beam.", show_default=False)]
DraftLength = Annotated[
    int | None, typer.Option(help="Beam shape: drafted tokens per beam, root not counted.", show_default=False)
]
TreeSize = Annotated[
    int | None, typer.Option(help="Beam shape: nodes verified per step, root counted.", show_default=False)
]
PromptLookup = Annotated[
    int,
    typer.Option(help="Also draft what followed when the text last ended like this, up to so many tokens; 0: not."),
]
LOOKUP = DecodeConfig.prompt_lookup


def decode_config(
    beam_width: int | None,
    branching: int | None,
    draft_length: int | None,
    tree_size: int | None,
    prompt_lookup: int = LOOKUP,
) -> DecodeConfig | None:
    """The beam shape asked for; None if nothing was, so that the program picks it."""
    asked = {
        "beam_width": beam_width,
        "branching": branching,
        "draft_length": draft_length,
        "tree_size": tree_size,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return from_mapping(DecodeConfig, {**given, "prompt_lookup": prompt_lookup}) if given else None


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Where to report what is being done: a status line on a terminal, plain lines elsewhere, nowhere if quiet."""
    if quiet:
        yield lambda message: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda message: status.update(message)
    else:
        yield lambda message: print(message, file=sys.stderr, flush=True)


def load_llm(
    model: str | None,
    drafter: str,
    dtype: str,
    device: str,
    max_context: int | None,
    *,
    backend: str = "auto",
    config: DecodeConfig | None = None,
    threads: int | None = None,
    quiet: bool = False,
    max_batch: int = 1,
    compile: bool = True,
    prompt_lookup: int = LOOKUP,
) -> LLM:
    """``LLM.from_pretrained`` with its progress on stderr; by default a single request at a time."""
    with progress(quiet) as tell:
        tell("importing the backend")
        from redrafter.llm import LLM
        from redrafter.models import DEFAULT_MODEL

        return LLM.from_pretrained(
            DEFAULT_MODEL if model is None else model,
            drafter_folder(drafter),
            backend=backend,
            dtype=dtype,
            device=device,
            max_context=max_context,
            max_batch=max_batch,
            config=config,
            threads=threads,
            compile=compile,
            prompt_lookup=prompt_lookup,
            progress=tell,
        )


def drafter_folder(name: str) -> str:
    """A run folder of ``redrafter train`` stands for the drafter in it."""
    inside = Path(name).expanduser() / "drafter"
    return str(inside) if (inside / "config.json").is_file() else name
