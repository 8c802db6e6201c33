"""``redrafter data``: the model writes the texts that its drafter learns from."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.training import interruptible, read_settings
from redrafter.errors import InvalidRequest

if TYPE_CHECKING:
    from redrafter.train.data import DataProgress

HELP = """Let MODEL answer prompts, given ones and its own, and keep the texts in the folder OUT.

Prompts are JSONL files with "messages", "conversations" (ShareGPT), "turns" or "prompt" in every line, or Hub data sets
(owner/name[:split]). With none the model writes its own. Given a budget it goes on with its own after the given ones.

Run the same command again after an interruption: it goes on where it stopped, and the data are the same.

\b
Examples:
  redrafter data --model ./my-model --out data
  redrafter data --model ./my-model --out data --prompts traffic.jsonl
  redrafter data --model smollm2-135m-instruct --out data --prompts a.jsonl --prompts b.jsonl --tokens 20000000
  redrafter data --model ./my-model --out data --seconds 600 --set greedy_share=0.8 --set max_new=512
"""
DEFAULT_TOKENS = {"cpu": 20_000, "cuda": 20_000_000}


def register(app: typer.Typer) -> None:
    app.command("data", help=HELP)(data)


def data(
    out: Annotated[Path, typer.Option(help="Folder of the data.")],
    model: opt.Model = None,
    prompts: Annotated[list[str] | None, typer.Option(help="JSONL file or Hub data set; may be repeated.")] = None,
    turns: Annotated[str, typer.Option(help="Of a conversation: answer the last user turn, or each.")] = "last",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop at this many answer tokens.", show_default=False)
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop after this time.", show_default=False)] = None,
    own: Annotated[
        bool | None, typer.Option("--own/--no-own", help="The model writes prompts, too.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same data.")] = 0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Another setting, KEY=VALUE.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from YAML or JSON.", show_default=False)] = None,
    json_out: Annotated[Path | None, typer.Option(help="A result to take figures from.", show_default=False)] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quiet: opt.Quiet = False,
) -> None:
    from redrafter.bench.provenance import command_line
    from redrafter.bench.results import measured
    from redrafter.models import DEFAULT_MODEL
    from redrafter.train.data import DataSettings, generate
    from redrafter.train.files import write_json
    from redrafter.train.prompts import read_prompts
    from redrafter.train.target import OpenModel

    values = read_settings(config, settings)
    given = read_prompts(prompts or [], turns)
    chosen = _settings(DataSettings, {"seed": seed, "own": not given or bool(tokens or seconds)} | values, own)
    opened = OpenModel(model or DEFAULT_MODEL, device, dtype)
    if chosen.own and tokens is None and seconds is None:
        tokens = DEFAULT_TOKENS[opened.device.type]
        if not quiet:
            print(f"no budget given: stopping at {tokens:,} answer tokens (--tokens, --seconds)", file=sys.stderr)

    def tell(progress: DataProgress) -> None:
        if not quiet:
            print(_line(progress), file=sys.stderr, flush=True)

    with interruptible():
        report = generate(opened, out, given, chosen, (tokens, seconds), tell)
    print(json.dumps({"out": str(out), **report}))
    if json_out is not None:
        metrics = {"kept_answer_tokens_per_second": (report["kept_answer_tokens_per_second"], "tokens/s")}
        metrics["kept_answer_tokens"] = (report["counts"].get("kept_answer_tokens", 0), "tokens")
        write_json(json_out, measured(metrics, opened.device, command_line(sys.argv[1:]), report))


def _settings(kind: Any, values: dict[str, Any], own: bool | None) -> Any:
    known = {f.name: type(f.default) for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"{name!r} is no setting of data: use one of {', '.join(known)}")
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            if known[name] is tuple and isinstance(value, list | int | float):
                values[name] = tuple(value) if isinstance(value, list) else (value,)
            else:
                raise InvalidRequest(f"{name}={value!r} is not allowed: it must be of type {known[name].__name__}")
    return kind(**values | ({} if own is None else {"own": own}))


def _line(progress: DataProgress) -> str:
    from redrafter.train.report import duration

    left = "" if progress.left is None else f"  {duration(progress.left)} left"
    return f"{progress.shards} shards  {progress.kept:,} answer tokens  {progress.rate:,.0f} tokens/s{left}"
