"""``redrafter eval``: what a drafter is worth on a file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from redrafter.cli import options as opt

HELP = """Tokens per step of DRAFTER, acceptance per depth and tree savings, by category, on the model's own answers.

A step's tokens count the model's own token. The real beam search and tree are used; since the model's own texts are
followed, the figures are those of decoding, and need no decoding per tree size.

\b
Examples:
  redrafter eval --model ./my-model --drafter run --prompts questions.jsonl
  redrafter eval --prompts questions.jsonl --category mt_bench --json-out mt.json
  redrafter eval --prompts questions.jsonl --temperature 1 --seed 0 --no-seed-coupled
  redrafter eval --model ./my-model --drafter run/drafter --prompts my-traffic.jsonl --save-shapes
"""


def register(app: typer.Typer) -> None:
    app.command("eval", help=HELP)(evaluate)


def evaluate(
    prompts: Annotated[list[str], typer.Option(help="JSONL file or Hub data set; may be repeated.")],
    model: opt.Model = None,
    drafter: opt.Drafter = "auto",
    category: Annotated[str, typer.Option(help="Only prompts whose category contains this.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    beam_width: Annotated[int, typer.Option(min=1, help="Beams kept per depth.")] = 8,
    branching: Annotated[int, typer.Option(min=1, help="Children scored per beam.")] = 8,
    vocabulary: Annotated[int, typer.Option(min=0, help="Of the drafter's most frequent tokens; 0: all.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of a temperature over 0: prompt number i has seed + i.")] = 0,
    seed_coupled: Annotated[
        bool, typer.Option("--seed-coupled/--no-seed-coupled", help="Beams see the noise that the model adds.")
    ] = True,
    prompt_lookup: opt.PromptLookup = opt.LOOKUP,
    save_shapes: Annotated[
        bool,
        typer.Option(
            "--save-shapes",
            help="Also measure the beam shapes that decoding picks from, and keep their tokens per step in the "
            "drafter's config.json: where its first choices come from. Use prompts like those it will serve.",
        ),
    ] = False,
    json_out: Annotated[Path | None, typer.Option(help="A result to take figures from.", show_default=False)] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
) -> None:
    from redrafter.backends.torch.checkpoint import update_metadata
    from redrafter.bench.provenance import command_line
    from redrafter.bench.results import measured
    from redrafter.errors import InvalidRequest
    from redrafter.models import DEFAULT_MODEL, resolve_drafter
    from redrafter.train import evaluate as measure
    from redrafter.train.files import write_json
    from redrafter.train.prompts import read_prompts
    from redrafter.train.target import OpenModel

    if save_shapes and temperature > 0:
        raise InvalidRequest("--save-shapes is measured on greedy answers: leave out --temperature")
    opened = OpenModel(model or DEFAULT_MODEL, device, dtype)
    folder = resolve_drafter(opt.drafter_folder(drafter), opened.files)
    if folder is None:
        raise InvalidRequest(
            f"--drafter {drafter}: there is no drafter to evaluate for {opened.files.name}; name a folder"
        )
    wanted = [p for p in read_prompts(prompts) if category in p.category]
    if not wanted:
        raise InvalidRequest(f"no prompt has a category that contains {category!r}: pass another --category")
    options = measure.EvalOptions(
        max_new_tokens,
        beam_width,
        branching,
        vocabulary=vocabulary,
        temperature=temperature,
        seed=seed,
        coupled=seed_coupled,
        prompt_lookup=prompt_lookup,
        shapes=save_shapes,
    )
    result = measure.evaluate(opened, folder, wanted, options)
    print("\n".join(_lines(result)))
    if save_shapes:
        texts = f"greedy answers to {len(wanted)} prompts, at most {max_new_tokens} tokens each"
        shapes = {"tokens_per_step": result["tokens_per_step"], "tokens_per_step_of": texts}
        update_metadata(folder, shapes)
        print(f"kept in {folder}: tokens per step of {len(shapes['tokens_per_step'])} beam shapes")
    if json_out is not None:
        metrics = measure.metrics(result)
        write_json(json_out, measured(metrics, opened.device, command_line(sys.argv[1:]), result))


def _lines(result: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for name, found in result["categories"].items():
        sizes = [key for key in found if key.isdigit()]
        if not out:
            out.append("tokens per step".ljust(20) + "".join(f"N={n}".rjust(8) for n in sizes) + "   texts")
        row = "".join(f"{found[n]['tokens_per_step']:8.3f}" for n in sizes)
        out.append(f"{name:20}{row}{found['texts']:8d}")
    accepted = "  ".join(f"{x:.3f}" for x in result["categories"]["all"]["acceptance_per_depth"])
    out.append(f"acceptance per depth: {accepted}")
    out.append(f"tree savings: {result['merged_share']:.1%} of the beams' tokens are shared prefixes")
    size = result["bytes"]
    out.append(f"drafter: {size['stored'] / 1e6:.2f} MB, {size['per_depth']:,} bytes read per drafted token")
    return out
