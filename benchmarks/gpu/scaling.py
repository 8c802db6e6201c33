"""Training on one and on several GPUs: anchors per second of the same program, the same batch on every GPU.

    python benchmarks/gpu/scaling.py --model M --data D --work W --out RESULT.json [--processes 2]

Each size is trained from nothing for the same number of steps; the rate is that of the steps after the first half, when
everything is compiled and warm. Both sizes start under torchrun and run in one call, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


def rate(log: Path, first_step: int) -> float:
    """Anchors per second of the lines after ``first_step``, weighed by their anchors."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "anchors_per_second" in line]
    anchors = seconds = 0.0
    for before, line in pairwise(lines):
        if before["step"] >= first_step:
            made = line["anchors"] - before["anchors"]
            anchors += made
            seconds += made / line["anchors_per_second"]
    if not seconds:
        raise SystemExit(f"{log}: no line of the log after step {first_step}: raise --steps")
    return anchors / seconds


def train(args: argparse.Namespace, processes: int) -> float:
    out = args.work / f"scaling-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    every = max(2, args.steps // 10)
    settings = {"steps": args.steps, "batches_per_step": processes, "eval_every": 10 * args.steps, "eval_texts": 1}
    settings |= dict(assignment.split("=", 1) for assignment in args.set)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["redrafter.cli", "train", "--model", str(args.model), "--data", str(args.data), "--out", str(out)]
    command += [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
    command += ["--log-every", str(every), "--save-every", str(10 * args.steps), "--device", args.device, "--quiet"]
    command += ["--compile"] if args.compile else []
    # torchrun would take one thread per process; the batches are made by the processor.
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")})
    return rate(out / "log.jsonl", args.steps // 2)


def result_of(args: argparse.Namespace, rates: dict[int, float]) -> dict[str, Any]:
    import torch

    from redrafter.bench.provenance import portable
    from redrafter.bench.results import measured

    many = max(rates)
    metrics: dict[str, tuple[Any, str]] = {f"ddp_scaling_{many}gpu": (round(rates[many] / rates[1], 3), "x")}
    metrics |= {f"anchors_per_second_{n}": (round(rates[n]), "anchors/s") for n in sorted(rates)}
    cuda = args.device != "cpu" and torch.cuda.is_available()
    command = shlex.join(["python", "benchmarks/gpu/scaling.py", *map(portable, args.command)])
    details = {"settings": {"steps": args.steps, "set": args.set, "compile": args.compile, "processes": sorted(rates)}}
    return measured(metrics, torch.device("cuda:0" if cuda else "cpu"), command, details)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of redrafter data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the result")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of either size")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of both sizes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(arguments)
    args.command = arguments
    if args.processes < 2:
        parser.error(f"--processes {args.processes}: compare one process with 2 or more")
    rates = {n: train(args, n) for n in (1, args.processes)}
    result = result_of(args, rates)
    from redrafter.train.files import write_json

    write_json(args.out, result)
    for name, value in result["summary"].items():
        print(f"{name:28}{value:>12} {result['units'][name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
