"""Count what training survives, on a tiny model and the processor.

    python benchmarks/robustness.py kills --count 200 --out RESULT.json      SIGKILL at random moments, then go on
    python benchmarks/robustness.py damaged --count 1000 --out RESULT.json   truncated, bit-flipped, zero-filled

A kill is survived if the run, gone on with, ends with the checkpoint of a run that nobody killed, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from redrafter.bench.provenance import portable
from redrafter.bench.results import measured, write_json
from redrafter.train.target import TrainingTarget
from tests.train import crashes


def kills(count: int, base: Path) -> tuple[dict[str, tuple[Any, str]], dict[str, int]]:
    model, data = base / "model", base / "data"
    crashes.write_model(model)
    data.mkdir()
    crashes.write_data(TrainingTarget.load(model, "cpu", torch.float32), data)
    found = crashes.kill_runs(model, data, base, count, lambda line: print(line, file=sys.stderr, flush=True))
    metrics = {"train_kills_survived": (found["kills_survived"], "kills"), "kills": (found["kills"], "kills")}
    return metrics | {"runs_that_differ": (found["runs_that_differ"] + found["runs_unusable"], "runs")}, found


def damaged(count: int, base: Path) -> tuple[dict[str, tuple[Any, str]], dict[str, int]]:
    found = crashes.damaged_checkpoints(base, count)
    metrics = {"damaged_checkpoints_loaded": (found["loaded"], "checkpoints")}
    return metrics | {"damaged_checkpoints": (found["damaged"], "checkpoints")}, found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "damaged"))
    parser.add_argument("--count", type=int, help="default: 200 kills, 1000 damaged checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the result")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as base:
        if args.what == "kills":
            metrics, found = kills(args.count or 200, Path(base))
        else:
            metrics, found = damaged(args.count or 1000, Path(base))
    command = shlex.join(["python", "benchmarks/robustness.py", *map(portable, arguments)])
    write_json(args.out, measured(metrics, torch.device("cpu"), command, {"found": found}))
    print(*(f"{name:28}{value:>8}" for name, (value, _) in metrics.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
