"""The GPU campaign: what plain and speculative decoding reach on this card, one result a run.

    python benchmarks/gpu/speed.py --model M --questions Q.jsonl --out FOLDER --stage small --stage 7b ...

Stages: ``fp32`` (greedy answers of the model in float32 against plain ones), ``small`` (the model itself in bfloat16),
``7b`` and ``1.5b`` (the instrument of benchmarks/README.md). A stage writes FOLDER/NAME-roofline.json (parts of a step,
bandwidths) and a result of ``redrafter bench`` per setting; ``worst`` is the smallest speed-up over all of them with
the program's own choice of shape. Figures are taken with ``redrafter bench --report RESULT --figure KEY=METRIC``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from redrafter.bench.measure import Plan
from redrafter.bench.prompts import load_prompts, select
from redrafter.bench.provenance import command_line, models
from redrafter.bench.report import forks_said
from redrafter.bench.results import measured, write_json
from redrafter.bench.roofline import UNITS, roofline
from redrafter.bench.run import Job, run
from redrafter.engine import Engine
from redrafter.llm import LLM
from redrafter.models import resolve, resolve_drafter
from redrafter.params import DecodeConfig, SamplingParams

SHAPE = DecodeConfig(beam_width=8, branching=8, draft_length=8, tree_size=64)
EXACT_BATCH = 4
PASSES = 4
"""Over sampled batches, each with other seeds: what two batches of 32 say depends by 5 % on the answers' lengths."""
TURNS = 200
"""Of the parts of a step. Medians of ten put its extra, a difference of two large times, between 0.077 and 0.083."""
STAGES = {"fp32": None, "small": None, "7b": "llama-2-7b", "1.5b": "qwen2.5-1.5b"}


class Campaign:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.files = resolve(str(args.model))
        drafter = resolve_drafter(args.drafter, self.files)
        assert drafter is not None, f"{args.model} has no drafter: name one with --drafter"
        self.drafter = drafter
        self.device = torch.device(args.device)
        self.worst: dict[str, float] = {}

    @staticmethod
    def fresh(llm: LLM) -> LLM:
        """Every prompt is read both ways: nothing is taken from the cache."""
        llm.engine.prefix_reuse = False
        return llm

    def open(self, stage: str) -> tuple[LLM, float]:
        started = time.perf_counter()
        shape, args = STAGES[stage], self.args
        if shape is None:
            exact = stage == "fp32"
            llm = LLM.from_pretrained(
                str(args.model),
                args.drafter,
                backend="torch",
                dtype="float32" if exact else args.dtype,
                device=args.device,
                max_context=args.max_context,
                max_batch=EXACT_BATCH if exact else args.max_batch,
                config=SHAPE if exact else None,
            )
        else:
            from redrafter.backends.torch.load import DTYPES
            from redrafter.bench.instrument import open_instrument

            llm = open_instrument(
                shape,
                self.files,
                self.drafter,
                device=self.device,
                dtype=DTYPES[args.dtype],
                compile=True,
                max_context=args.max_context,
                max_batch=args.max_batch,
                config=None,
            )
        return self.fresh(llm), time.perf_counter() - started

    def bench(self, stage: str, name: str, llm: LLM, start: float, **plan: Any) -> None:
        """One result; ``limit`` prompts (0: all), spread over those of the category, ``passes`` times."""
        args = self.args
        if args.only and name not in args.only:
            return
        found = load_prompts(args.questions)
        limit, batch, control = plan.pop("limit"), plan.pop("batch", 1), plan.pop("control", False)
        prompts = select(found, plan.pop("category", args.category), limit or None, True) * plan.pop("passes", 1)
        params = SamplingParams(max_new_tokens=args.max_new_tokens, **plan)
        job = Job(
            found=found,
            prompts=prompts,
            plan=Plan(params=params, batch=batch, control=control),
            weights=models(self.files, self.drafter),
            start_seconds=start,
            command=self.command("--name", name),
            memory=control,
        )
        result = run(llm, job, args.out / f"{args.prefix}{stage}-{name}.json", lambda _: None)
        if result["partial"]:
            raise KeyboardInterrupt
        s = result["summary"]
        print(
            f"{stage:<6}{name:<22} x{s['speedup_per_token']:.3f} ({s['speedup_q1']:.2f}..{s['speedup_q3']:.2f}) plain "
            f"{s['plain_tokens_per_second']:.0f} spec {s['speculative_tokens_per_second']:.0f} tok/s, tau "
            f"{s['tokens_per_step']:.3f}, forks {forks_said(s)}, {time.perf_counter() - T0:.0f} s",
            flush=True,
        )
        if "adaptive" in name:
            self.worst[f"{stage}-{name}"] = s["speedup_per_token"]
            self.write_worst()

    def write_worst(self) -> None:
        """Of what is finished, so that an interruption loses nothing."""
        metrics = {"worst_speedup": (min(self.worst.values()), "x")}
        details = {"speedups": self.worst}
        write_json(
            self.args.out / f"{self.args.prefix}worst.json", measured(metrics, self.device, self.command(), details)
        )

    @staticmethod
    def command(*more: str) -> str:
        return command_line(["bench", *sys.argv[1:], *more]).replace("redrafter bench", "speed.py", 1)

    def roofline(self, stage: str, llm: LLM, start: float) -> None:
        backend: Any = llm.engine.backend
        found = roofline(backend, SHAPE, TURNS if self.device.type == "cuda" else 1)
        phases = found.pop("phases")
        metrics = {name: (value, UNITS[name]) for name, value in found.items()} | {"start_seconds": (start, "s")}
        table = llm.engine.policy.table()
        details = {"phases_ms": phases, "stage": stage, "cost_table": [_plain(row) for row in table]}
        write_json(
            self.args.out / f"{self.args.prefix}{stage}-roofline.json",
            measured(metrics, backend.device, self.command(), details),
        )
        print(stage, *(f"{k} {v:.4g}" for k, v in found.items()), f"start {start:.1f} s", sep="\n  ")
        print(*(f"  {name:<20}{value:.3f} ms" for name, value in phases.items()), sep="\n", flush=True)

    def stage(self, stage: str) -> None:
        llm, start = self.open(stage)
        args = self.args
        backend = llm.engine.backend
        if stage == "fp32":
            self.bench(stage, "greedy", llm, start, limit=args.exact, batch=EXACT_BATCH, category="")
            return
        engine = Engine(backend, SHAPE, args.max_batch)
        fixed = self.fresh(LLM(engine, llm.tokenizer, model=llm.model, drafter=llm.drafter))
        self.roofline(stage, llm, start)
        few = args.limit
        self.bench(stage, "greedy-n64", fixed, start, limit=few, control=args.control)
        self.bench(stage, "greedy-adaptive", llm, start, limit=few)
        self.bench(stage, "t1-adaptive", llm, start, limit=few and max(4, few // 2), temperature=1.0)
        for batch in args.batches:
            whole = {"limit": batch * max(2, min(3, 48 // batch)), "batch": batch}  # a part of one has fewer rows
            self.bench(stage, f"b{batch}-adaptive", llm, start, **whole)
            if batch in args.sampled:
                self.bench(stage, f"b{batch}-t1-adaptive", llm, start, temperature=1.0, passes=PASSES, **whole)


def _plain(row: Any) -> Any:
    return row._asdict() | {"config": dataclasses.asdict(row.config)} if hasattr(row, "_asdict") else row


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Arguments: what is measured, and on which prompts."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--category", default="mt_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--stage", action="append", choices=list(STAGES), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=20, help="prompts at batch 1; 0: all of the category")
    parser.add_argument("--exact", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8, 32])
    parser.add_argument("--sampled", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of a stage's results these")
    parser.add_argument("--control", action="store_true", help="greedy-n64: count the forks of padded plain steps too")
    args = parser.parse_args()
    campaign = Campaign(args)
    for stage in args.stage:
        started = time.perf_counter()
        try:
            campaign.stage(stage)
        except Exception:  # noqa: BLE001 - device time is dear: the other stages go on
            traceback.print_exc(limit=8)
        print(f"{stage}: {time.perf_counter() - started:.0f} s in all", flush=True)
        torch.cuda.empty_cache()
    if campaign.worst:
        print("worst", min(campaign.worst.items(), key=lambda item: item[1]), flush=True)


T0 = time.perf_counter()
if __name__ == "__main__":
    main()
