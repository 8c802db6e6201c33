"""One table of drafters: every variant trained on the same data for the same number of steps, then measured.

    python benchmarks/gpu/ablations.py --model M --data D [--data D2] --questions Q.jsonl --work W --out RESULT.json

Every training is a process of its own, several at a time on every GPU, the most important first. Run the same command
again to go on: finished ones are kept, interrupted ones resume from their checkpoint. RESULT.json is written at the end
of every call, with what is finished; it is marked partial until the runs that its two ratios need are there.

The questions are only measured on. Their answers are written once, greedily and at temperature 1, and every drafter is
followed along them by the real beam search and tree (docs/training.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

SEEDS = (0, 1, 2)
PAPER = {"cell": "rnn", "head": "own", "features": "last", "context_state": False, "draft_vocabulary": 0}
PAPER |= {"num_blocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "no distillation": {"loss": "ce"},
    "medusa": {"cell": "medusa"},
    "rnn": {"cell": "rnn"},
    "last features": {"features": "last"},
    "no trunk": {"trunk_layers": 0},
    "kl": {"loss": "kl"},
    "own head": {"head": "own"},
    "tv": {"loss": "tv"},
    "vocabulary 8192": {"draft_vocabulary": 8192},
    "whole vocabulary": {"draft_vocabulary": 0},
    "paper": PAPER,
}
"""Each differs from the shipped recipe in what is said and nothing else; ``paper`` is the head of arXiv 2403.09919."""
SEEDED = ("shipped", "no distillation", "medusa")
"""Trained with every seed: the two pairs that the ratios compare."""
BASE: dict[str, Any] = {"batch_tokens": 16384, "ema": 0.99, "warmup_steps": 100, "eval_texts": 200}
"""Of every variant, where it differs from the defaults of ``redrafter train``: these runs are short."""
TREE = "64"


class Job(NamedTuple):
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.replace(' ', '-')}-s{self.seed}"


def jobs(variants: list[str], seeds: tuple[int, ...] = SEEDS) -> list[Job]:
    """The most important first: the two pairs, seed by seed, then one run of each of the others."""
    paired = [Job(v, seed) for seed in seeds for v in SEEDED if v in variants]
    return paired + [Job(v, seeds[0]) for v in variants if v not in SEEDED]


def shared_settings(args: argparse.Namespace) -> dict[str, Any]:
    given = dict(assignment.split("=", 1) for assignment in args.set)
    return {**BASE, **given, "steps": args.steps, "eval_every": args.steps}


def run_job(args: argparse.Namespace, job: Job) -> None:
    """Train one drafter and measure it; its table becomes W/runs/NAME/result.json."""
    from redrafter.backends.torch.checkpoint import load_drafter, read_metadata
    from redrafter.train.conduct import Conduct
    from redrafter.train.evaluate import EvalOptions, Evaluation, by_category
    from redrafter.train.files import write_json
    from redrafter.train.prompts import read_prompts
    from redrafter.train.run import Run
    from redrafter.train.samples import Samples
    from redrafter.train.settings import drafter_bytes, make_settings
    from redrafter.train.target import OpenModel

    folder = args.work / "runs" / job.name
    settings = make_settings({**shared_settings(args), **VARIANTS[job.variant], "seed": job.seed})
    opened = OpenModel(str(args.model), args.device, args.dtype)
    conduct = Conduct(save_every=500, keep=1, log_every=100, compile=args.compile)
    run = Run(opened, Samples(args.data), folder, settings, conduct)
    summary = run.fit()
    drafter = load_drafter(folder / "drafter")
    prompts = read_prompts([str(args.questions)])
    evaluation = Evaluation(run.learner.target, drafter)
    found = {
        "greedy": by_category(
            evaluation, answers(args, opened, 0.0), prompts, EvalOptions(args.max_new, prompt_lookup=0)
        )
    }
    if job == Job("shipped", SEEDS[0]):
        for coupled in (True, False):
            options = EvalOptions(args.max_new, temperature=1.0, coupled=coupled, rows=512, prompt_lookup=0)
            name = f"t1 {'coupled' if coupled else 'uncoupled'}"
            found[name] = by_category(evaluation, answers(args, opened, 1.0), prompts, options)
    size = drafter_bytes(drafter.config)
    heldout = read_metadata(folder / "drafter")["heldout_tokens_per_step"]
    result = {"variant": job.variant, "seed": job.seed, "changes": VARIANTS[job.variant], "steps": summary["steps"]}
    result |= {"seconds": round(run.progress.trained_seconds, 1), "anchors": run.progress.anchors}
    result |= {"parameters": sum(p.numel() for p in drafter.parameters()), "megabytes": round(size.stored / 1e6, 3)}
    result |= {"bytes_per_depth": size.per_depth, "bytes_per_step": size.per_step, "coverage": summary["coverage"]}
    write_json(folder / "result.json", result | {"heldout": heldout[TREE], "questions": found})


def answers(args: argparse.Namespace, opened: Any, temperature: float) -> list[Any]:
    """The target's answers to the questions, written once into the work folder and read from there by every job."""
    from transformers import AutoTokenizer

    from redrafter.train.evaluate import AnswerText, EvalOptions, write_answers
    from redrafter.train.files import write_json
    from redrafter.train.prompts import read_prompts

    path = args.work / f"answers-t{temperature:g}.json"
    if not path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(opened.files.path, local_files_only=True)
        options = EvalOptions(args.max_new, temperature=temperature)
        texts = write_answers(opened.target(), tokenizer, read_prompts([str(args.questions)]), options)
        write_json(path, [[t.tokens.tolist(), t.start] for t in texts])
    import numpy as np

    return [AnswerText(np.array(tokens), start) for tokens, start in json.loads(path.read_text())]


def prepare(args: argparse.Namespace) -> None:
    from redrafter.train.target import OpenModel

    opened = OpenModel(str(args.model), args.device, args.dtype)
    for temperature in (0.0, 1.0):
        answers(args, opened, temperature)


class Pool:
    """Runs one command per job, ``width`` at a time on every GPU, until the deadline; then they save and end."""

    def __init__(self, gpus: list[str], width: int, seconds: float, log_folder: Path) -> None:
        self.slots = [gpu for _ in range(width) for gpu in gpus]
        self.deadline = time.monotonic() + seconds
        self.log_folder = log_folder
        self.lock = threading.Lock()
        self.children: set[subprocess.Popen[bytes]] = set()
        self.failed: list[str] = []

    def run(self, waiting: list[tuple[str, list[str]]]) -> None:
        """``waiting``: (name, command), in the order of their importance."""
        self.log_folder.mkdir(parents=True, exist_ok=True)
        queue = list(waiting)
        threads = [threading.Thread(target=self._work, args=(gpu, queue)) for gpu in self.slots]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            if time.monotonic() > self.deadline:
                with self.lock:
                    queue.clear()
                    for child in self.children:
                        child.send_signal(signal.SIGTERM)
                break
            time.sleep(0.2)
        for thread in threads:
            thread.join()

    def _work(self, gpu: str, queue: list[tuple[str, list[str]]]) -> None:
        while True:
            with self.lock:
                if not queue or time.monotonic() > self.deadline:
                    return
                name, command = queue.pop(0)
                log = (self.log_folder / f"{name}.txt").open("ab")
                environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
                child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                self.children.add(child)
            code = child.wait()
            log.close()
            with self.lock:
                self.children.discard(child)
                if code not in (0, 130) and not (code < 0 and time.monotonic() > self.deadline):
                    self.failed.append(f"{name} (exit {code}, {log.name})")
            print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'exit {code}'}", flush=True)


def gpus(device: str) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES; one empty name where there is no GPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return [""]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def collect(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = [args.work / "runs" / job.name / "result.json" for job in jobs(args.variants)]
    return [json.loads(path.read_text()) for path in found if path.is_file()]


def questions_tokens_per_step(run: dict[str, Any], group: str, way: str = "greedy") -> float | None:
    table = run["questions"].get(way, {}).get("categories", {}).get(group)
    return table[TREE]["tokens_per_step"] if table else None


def variants_table(runs: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """One row per variant: tokens per step as the mean over its seeds, each, and their standard deviation."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "seeds": [run["seed"] for run in mine]}
        for name, values in (
            ("questions", [questions_tokens_per_step(run, group) for run in mine]),
            ("heldout", [run["heldout"] for run in mine]),
        ):
            row[name] = round(mean(values), 4)
            row[f"{name}_each"] = values
            row[f"{name}_spread"] = round(stdev(values), 4) if len(values) > 1 else None
        row["seconds"] = round(mean(run["seconds"] for run in mine), 1)
        same = ("steps", "parameters", "megabytes", "bytes_per_depth", "bytes_per_step", "coverage", "changes")
        rows.append(row | {name: mine[0][name] for name in same})
    return rows


def gain(rows: dict[str, dict[str, Any]], better: str, worse: str, what: str) -> dict[str, tuple[Any, str]]:
    """The ratio of two variants, seed by seed, with the standard deviation over the seeds; nothing without both."""
    if better not in rows or worse not in rows:
        return {}
    pairs = {}
    for name in (better, worse):
        pairs[name] = dict(zip(rows[name]["seeds"], rows[name][f"{what}_each"], strict=True))
    seeds = sorted(set(pairs[better]) & set(pairs[worse]))
    if not seeds:
        return {}
    ratios = [pairs[better][s] / pairs[worse][s] for s in seeds]
    out = {"": (round(mean(ratios), 4), "x"), "_lowest": (round(min(ratios), 4), "x")}
    out |= {"_highest": (round(max(ratios), 4), "x"), "_seeds": (len(seeds), "seeds")}
    return out | ({"_spread": (round(stdev(ratios), 4), "x")} if len(seeds) > 1 else {})


def report(args: argparse.Namespace) -> dict[str, Any]:
    """The result of all finished runs."""
    import torch

    from redrafter.bench.provenance import portable
    from redrafter.bench.results import measured
    from redrafter.files import sha256

    runs = collect(args)
    rows = variants_table(runs, args.group)
    by_name = {row["variant"]: row for row in rows}
    metrics: dict[str, tuple[Any, str]] = {}
    for what, suffix in (("questions", ""), ("heldout", "_heldout")):
        for key, worse in (("gain_distillation", "no distillation"), ("gain_recurrent_over_medusa", "medusa")):
            found = gain(by_name, "shipped", worse, what)
            metrics |= {key + suffix + name: value for name, value in found.items()}
    for run in runs:
        for way in ("t1 coupled", "t1 uncoupled"):
            if way in run["questions"]:
                value = questions_tokens_per_step(run, args.group, way)
                metrics[f"shipped_{way.replace(' ', '_')}"] = (value, "tokens")
    settings = {"steps": args.steps, "processes_per_gpu": args.per_gpu, "shared": shared_settings(args)}
    settings |= {"max_new": args.max_new, "group": args.group, "tree_size": int(TREE), "beam_width": 8, "branching": 8}
    details = {
        "settings": settings,
        "data_sha256": {portable(str(d)): sha256(d / "manifest.json") for d in args.data},
        "questions_sha256": sha256(args.questions),
        "variants": rows,
        "runs": runs,
    }
    device = torch.device("cuda:0" if gpus(args.device)[0] else "cpu")
    command = shlex.join(["python", "benchmarks/gpu/ablations.py", *map(portable, args.command)])
    finished = all((args.work / "runs" / job.name / "result.json").is_file() for job in jobs(list(SEEDED)))
    return measured(metrics, device, command, details, partial=not finished)


def show(result: dict[str, Any]) -> None:
    print(f"{'variant':18}{'questions':>11}{'spread':>8}{'heldout':>9}{'seconds':>9}{'MB':>8}{'MB/depth':>10}  seeds")
    for row in sorted(result["variants"], key=lambda row: -row["questions"]):
        spread = "-" if row["questions_spread"] is None else f"{row['questions_spread']:.3f}"
        numbers = f"{row['questions']:11.3f}{spread:>8}{row['heldout']:9.3f}{row['seconds']:9.1f}"
        sizes = f"{row['megabytes']:8.2f}{row['bytes_per_depth'] / 1e6:10.2f}"
        print(f"{row['variant']:18}{numbers}{sizes}  {row['seeds']}")
    for name, value in result["summary"].items():
        print(f"{name:44}{value:>10} {result['units'][name]}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, action="append", required=True, help="folder of redrafter data")
    parser.add_argument("--questions", type=Path, required=True, help="JSONL; measured on, never trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs, to go on from")
    parser.add_argument("--out", type=Path, required=True, help="the result")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--steps", type=int, default=1200, help="of every run")
    parser.add_argument("--per-gpu", type=int, default=3, help="trainings at a time on every GPU")
    parser.add_argument("--group", default="mt_bench", help="category of the questions that the ratios are of")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--max-new", type=int, default=256)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.command = arguments
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.job == "prepare":
        prepare(args)
        return 0
    if args.job:
        from redrafter.errors import RedrafterError

        try:
            run_job(args, next(job for job in jobs(args.variants) if job.name == args.job))
        except KeyboardInterrupt:
            return 130
        except RedrafterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    # Compiled kernels are shared by all runs; each process compiles few, so none needs helpers of its own.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").resolve()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "4")

    def command(job: str) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), *arguments, "--job", job]

    if not (args.work / "answers-t1.json").is_file():
        subprocess.run(command("prepare"), check=True)
    waiting = [j for j in jobs(args.variants) if not (args.work / "runs" / j.name / "result.json").is_file()]
    pool = Pool(gpus(args.device), args.per_gpu, 60 * args.minutes - (time.monotonic() - started), args.work / "logs")
    pool.run([(job.name, command(job.name)) for job in waiting])
    result = report(args)
    from redrafter.train.files import write_json

    write_json(args.out, result)
    show(result)
    left = [j.name for j in jobs(args.variants) if not (args.work / "runs" / j.name / "result.json").is_file()]
    print(f"still to do: {', '.join(left) or 'nothing'}", *(f"failed: {line}" for line in pool.failed), sep="\n")
    return 1 if pool.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
