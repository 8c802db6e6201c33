"""Where an answer's time goes on a GPU: prompt, graphs of steps, pauses between them, and a step's kernels.

    python benchmarks/gpu/trace.py --model M --questions Q.jsonl --stage 7b
    python benchmarks/gpu/trace.py --model M --questions Q.jsonl --stage small --pauses    # each of them, and the host

A profiler watches one answer each way; it makes the host slower (launches of graphs take several times as long), the
kernels hardly. Kernels that start early overlap: their times add up to more than a step's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cuda_runtime", "cuda_driver")
LEAST = 50
"""Kernels of a graph at least; what has fewer is a launch of its own."""


class Work(NamedTuple):
    """What one call of the host had the device do, in microseconds of the trace."""

    start: float
    end: float
    kernels: tuple[tuple[str, float], ...]

    @property
    def is_graph(self) -> bool:
        return len(self.kernels) >= LEAST


def works(events: Sequence[Mapping[str, Any]]) -> list[Work]:
    """Of a trace's events, in their order: those of one graph share their correlation."""
    calls: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in DEVICE:
            calls[event["args"].get("correlation")].append(event)
    found = []
    for call in calls.values():
        call.sort(key=lambda event: event["ts"])
        ends = max(e["ts"] + e["dur"] for e in call)
        found.append(Work(call[0]["ts"], ends, tuple((e["name"], e["dur"]) for e in call)))
    return sorted(found)


def table(found: Sequence[Work]) -> list[str]:
    """The first graph reads the prompt, the others are steps; of their kernels the medians."""
    graphs = [work for work in found if work.is_graph]
    if len(graphs) < 4:
        return [f"{len(graphs)} graphs: too few to say something"]
    prompt, *steps = graphs
    spans = [work.end - work.start for work in steps]
    pauses = [after.start - before.end for before, after in pairwise(steps)]
    lines = [
        f"prompt {prompt.end - prompt.start:.0f} us, then a pause of {steps[0].start - prompt.end:.0f}",
        f"{len(steps)} steps of {statistics.median(spans):.1f} us, pauses of {statistics.median(pauses):.1f} between",
    ]
    taken: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for work in steps:
        times: dict[str, list[float]] = defaultdict(list)
        for name, duration in work.kernels:
            times[name].append(duration)
        for name, values in times.items():
            taken[name].append((len(values), sum(values)))
    medians = {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in taken.items()}
    for name, (count, total) in sorted(medians.items(), key=lambda item: -item[1][1]):
        lines.append(f"  {name[:60]:<60} {count:5.0f} {total:9.1f} us")
    return lines


def timeline(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything the device did, and the host's calls that took long, from the first of them on."""
    lines = []
    for start, end, kernels in works(events):
        lines.append((start, f"device {start:9.1f} to {end:9.1f}  {len(kernels):4d} {kernels[0][0][:60]}"))
    for event in events:
        if event.get("cat") in HOST and (event["dur"] > 20 or "Graph" in event["name"]):
            lines.append((event["ts"], f"    host {event['ts']:9.1f} +{event['dur']:.0f} {event['name']}"))
    return [line for _, line in sorted(lines)]


def traced(function: Callable[[], Any]) -> list[dict[str, Any]]:
    """The events while the function runs, times from the first one on."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    timed = [event for event in events if event.get("cat") in (*DEVICE, *HOST)]
    first = min(event["ts"] for event in timed)
    return [event | {"ts": event["ts"] - first} for event in timed]


def main() -> None:
    from speed import SHAPE, Campaign, add_subject  # beside this script

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--stage", choices=["small", "7b", "1.5b"], default="small")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--pauses", action="store_true", help="all the device did, in order, and the host's long calls")
    parser.set_defaults(device="cuda", dtype="bfloat16", max_context=1024, max_batch=1)
    args = parser.parse_args()
    from redrafter.bench.prompts import load_prompts, select
    from redrafter.engine import Engine
    from redrafter.llm import LLM
    from redrafter.params import SamplingParams

    campaign = Campaign(args)
    llm, _ = campaign.open(args.stage)
    fixed = campaign.fresh(
        LLM(Engine(llm.engine.backend, SHAPE, 1), llm.tokenizer, model=llm.model, drafter=llm.drafter)
    )
    prompt = select(load_prompts(args.questions), args.category, 1, True)[0].prompt
    params = SamplingParams(max_new_tokens=args.max_new_tokens)
    for speculation in (True, False):
        answer = partial(fixed.generate, [prompt], [params], speculation=speculation)
        answer()
        events = traced(answer)
        lines = timeline(events) if args.pauses else table(works(events))
        print("speculative" if speculation else "plain", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
