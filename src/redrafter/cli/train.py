"""``redrafter train``: distil a model into a drafter."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.training import read_settings

HELP = """Train a drafter for MODEL on the texts in DATA, in the run folder OUT; OUT/drafter is the best one so far.

The schedule is --steps, --epochs or --minutes (of training; the learning rate then follows the clock). Run the same
command again after an interruption: it goes on from the newest whole checkpoint. Ctrl-C and SIGTERM save first.

Everything else is a setting: --set KEY=VALUE, or --config with a YAML or JSON file. docs/training.md lists them.

\b
Examples:
  redrafter train --model ./my-model --data data --out run
  redrafter train --model ./my-model --data data --out run --plan
  redrafter train --model ./my-model --data data --data more --out run --minutes 20 --compile
  redrafter train --model ./my-model --data data --out run --steps 6000 --set cell=rnn --set loss=kl
  torchrun --nproc-per-node 2 -m redrafter.cli train --model ./my-model --data data --out run --set batches_per_step=2
"""
DEFAULT_EPOCHS = 10.0


def register(app: typer.Typer) -> None:
    app.command("train", help=HELP)(train)


def train(
    data: Annotated[list[Path], typer.Option(help="Folder that redrafter data wrote; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, log, drafter.")],
    model: opt.Model = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train for.", show_default=False)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Or passes over the data. Default: 10.", show_default=False)
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Or minutes of training.", show_default=False)] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations.", show_default=False)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=0, help="Stop after this many evaluations without a better one.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Same seed, same weights (on the CPU).", show_default=False)
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Another setting, KEY=VALUE.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from YAML or JSON.", show_default=False)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print steps, tokens, memory and bytes; do not train.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.")] = 3,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.")] = 50,
    stop_after: Annotated[
        float | None, typer.Option(help="Seconds after which this call saves and ends.", show_default=False)
    ] = None,
    compile_loss: Annotated[bool, typer.Option("--compile", help="torch.compile the loss (GPU).")] = False,
    cached: Annotated[
        Path | None,
        typer.Option(help="Keep the model's hidden states here, for later runs, too.", show_default=False),
    ] = None,
    shard_teacher: Annotated[
        bool, typer.Option("--shard-teacher", help="Spread MODEL over the processes of torchrun (FSDP2).")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder to write the log to for TensorBoard, too.", show_default=False)
    ] = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    quiet: opt.Quiet = False,
) -> None:
    from redrafter.models import DEFAULT_MODEL
    from redrafter.train.conduct import Conduct
    from redrafter.train.plan import estimate
    from redrafter.train.run import Run
    from redrafter.train.samples import Samples
    from redrafter.train.settings import make_settings
    from redrafter.train.target import OpenModel

    named = {"steps": steps, "epochs": epochs, "minutes": minutes, "eval_every": eval_every}
    named |= {"patience": patience, "seed": seed}
    values = read_settings(config, settings) | {k: v for k, v in named.items() if v is not None}
    if not any(values.get(name) for name in ("steps", "epochs", "minutes")):
        values["epochs"] = DEFAULT_EPOCHS
    chosen = make_settings(values)
    opened = OpenModel(model or DEFAULT_MODEL, _device(device), dtype)
    samples = Samples(data)
    if plan:
        print("\n".join(_lines(estimate(opened, samples, chosen))))
        return
    conduct = Conduct(
        save_every,
        keep,
        log_every,
        math.inf if stop_after is None else stop_after,
        tensorboard=tensorboard,
        compile=compile_loss,
        cached=cached,
        shard_teacher=shard_teacher,
        quiet=quiet,
    )
    run = Run(opened, samples, out, chosen, conduct)
    summary = run.fit()
    if run.group.rank == 0:
        print(json.dumps(summary))


def _device(device: str) -> str:
    """auto under torchrun: the process's own GPU."""
    if device != "auto" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"


def _lines(plan: dict[str, Any]) -> list[str]:
    drafter = plan.pop("drafter")
    rows = [f"{name.replace('_', ' '):24} {value:,}" for name, value in plan.items() if value is not None]
    shape = ", ".join(f"{k}={v}" for k, v in drafter.items())
    return [*rows, f"{'drafter':24} {shape}"]
