"""What the server stands, counted, and what it gains through HTTP, timed. One result JSON a run.

    python benchmarks/serving.py fuzz --tiny --out R.json          schemathesis, 1,000 examples an operation and kind
    python benchmarks/serving.py malformed --tiny --out R.json     every request of tests/server/malformed.py
    python benchmarks/serving.py streams --tiny --out R.json       256 streams at once
    python benchmarks/serving.py disconnects --tiny --out R.json   500 clients that leave at random moments
    python benchmarks/serving.py soak --tiny --out R.json          10,000 short requests, growth of the server's memory
    python benchmarks/serving.py ttft --out R.json                 a prompt of 2,000 tokens beside running streams
    python benchmarks/serving.py speed --out R.json                speculation against plain at --levels 1,4,8
    python benchmarks/serving.py speed --paced --out R.json        the same over a stand-in for a GPU (what HTTP costs)
    python benchmarks/serving.py speed --instrument llama-2-7b --device cuda --dtype bfloat16 --levels 1,8,32 ...

Without --tiny it is the default model, or --model with its --drafter. Figures are taken with
``redrafter bench --report R.json --figure KEY=METRIC``; the metrics are printed at the end.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from serving_host import host, hosted, open_llm
from serving_speed import speed

from redrafter.bench.prompts import load_prompts, select
from redrafter.bench.provenance import portable
from redrafter.bench.results import measured, write_json
from redrafter.models import DEFAULT_MODEL
from tests.server import load
from tests.server.client import chat
from tests.server.serving import running

Metrics = dict[str, tuple[Any, str]]
Found = tuple[Metrics, dict[str, Any]]
FIRST = 1000
"""requests of the soak before its memory is first read"""
# count, context, batch, queue: what a plain run of each command uses
DEFAULTS = {
    "fuzz": (1000, 64, 8, 128),
    "malformed": (1, 256, 4, 128),
    "streams": (256, 640, 256, 256),
    "disconnects": (500, 256, 4, 128),
    "soak": (10_000, 256, 8, 128),
    "ttft": (4, 2560, 8, 128),
    "speed": (8, 2048, 8, 128),
    "host": (1, 256, 8, 128),
}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fuzz(args: argparse.Namespace) -> Found:
    from schemathesis import GenerationMode

    from tests.server.fuzzing import fuzz as examples
    from tests.server.fuzzing import operations

    rows = []
    with running(open_llm(args)) as run:
        for operation in operations(run.url):
            for mode in GenerationMode:
                one = examples(run.url, operation, mode, args.count, args.seed, tell)
                statuses = {str(status): count for status, count in sorted(one.statuses.items())}
                rows.append({"operation": operation.label, "kind": mode.value, "requests": one.requests})
                rows[-1] |= {"statuses": statuses, "failures": one.failures}
                tell(f"{operation.label:28}{mode.value:10}{one.requests:>6} {statuses} failures {len(one.failures)}")
        assert chat(run.url).status_code == 200
        run.engine.check()
    failures = sum(len(row["failures"]) for row in rows)
    asked = sum(row["requests"] for row in rows)
    unavailable = sum(row["statuses"].get("503", 0) for row in rows)
    metrics: Metrics = {"failures": (failures, "failures"), "requests": (asked, "requests")}
    return metrics | {"answered_503": (unavailable, "requests")}, {"operations": rows}


def malformed(args: argparse.Namespace) -> Found:
    from tests.server.malformed import ask_all

    with running(open_llm(args)) as run:
        before = chat(run.url).json()["choices"]
        told = list(ask_all(run.url))
        same = chat(run.url).json()["choices"] == before
        run.engine.check()
    odd = [answer._asdict() for answer in told if answer.status != answer.wanted or not answer.shaped]
    metrics: Metrics = {
        "answered_5xx": (sum(answer.status >= 500 for answer in told), "requests"),
        "requests": (len(told), "requests"),
        "other_status_or_shape": (len(odd), "requests"),
        "next_answer_differs": (int(not same), "answers"),
    }
    return metrics, {"odd": odd}


def streams(args: argparse.Namespace) -> Found:
    with running(open_llm(args), max_queue=args.max_queue) as run:
        held = load.hold_streams(run, args.count, args.tokens, tell)
        run.engine.check()
    metrics: Metrics = {
        "streams_held": (min(held), "streams"),
        "streams_complete": (held.complete, "streams"),
        "streams_at_once": (held.at_once, "streams"),
        "rows_at_once": (held.running, "rows"),
    }
    return metrics, {"tokens_each": args.tokens}


def disconnects(args: argparse.Namespace) -> Found:
    with running(open_llm(args), max_queue=args.max_queue) as run:
        found = load.disconnect(run, args.count, args.seed, tell)
    metrics: Metrics = {"leaked": (found["leaked"], "rows and requests"), "clients": (found["clients"], "clients")}
    return metrics | {"next_answer_differs": (found["next_answer_differs"], "answers")}, {"found": found}


def soak(args: argparse.Namespace) -> Found:
    first = min(FIRST, args.count // 2)
    with hosted(child_arguments(args)) as server:
        statuses = load.short_requests(server.url, first, 4, tell)
        early = server.resident_bytes()
        statuses += load.short_requests(server.url, args.count - first, 4, tell, first)
        late = server.resident_bytes()
    metrics: Metrics = {
        "memory_growth": (late / early - 1, "of the memory after the first requests"),
        "requests": (args.count, "requests"),
        "not_200": (args.count - statuses[200], "requests"),
        "bytes_early": (early, "B"),
        "bytes_late": (late, "B"),
    }
    return metrics, {"first": first}


def ttft(args: argparse.Namespace) -> Found:
    llm = open_llm(args)
    vocab = llm.engine.backend.target.vocab_size
    prompt = [1 + (37 * i) % (min(vocab, 30_000) - 2) for i in range(args.prompt_tokens)]
    with running(llm) as run:
        gaps = load.long_prompt(run, args.count, prompt, args.tokens, tell)
        run.engine.check()
    metrics: Metrics = {
        "delay_chunks": (gaps.most_between, "prompt chunks between two steps"),
        "delay_in_chunk_times": (gaps.delay, "times of one prompt chunk"),
        "prompt_chunks": (gaps.chunks, "prompt chunks"),
        "chunk_seconds": (gaps.chunk_seconds, "s"),
        "usual_gap": (gaps.usual_gap, "s"),
        "longest_gap": (gaps.longest_gap, "s"),
    }
    return metrics, {"prompt_tokens": args.prompt_tokens, "streams": args.count}


def timed(args: argparse.Namespace) -> Found:
    levels = [int(level) for level in args.levels.split(",")]
    with hosted([*child_arguments(args), "--no-prefix-reuse"]) as server:
        prompts = select(load_prompts(args.prompts), args.category, args.limit, True)
        return speed(server, levels, args.count, args.tokens, prompts, tell)


def child_arguments(args: argparse.Namespace) -> list[str]:
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *(f"--{name}" for name in ("tiny", "paced") if getattr(args, name))]


OPTIONS = ("model", "drafter", "dtype", "device", "threads", "instrument", "max_context", "max_batch", "max_queue")
COMMANDS = {
    "fuzz": fuzz,
    "malformed": malformed,
    "streams": streams,
    "disconnects": disconnects,
    "soak": soak,
    "ttft": ttft,
    "speed": timed,
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*COMMANDS, "host"))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument(
        "--paced", action="store_true", help="a stand-in for a GPU: steps of 6 ms that need no processor"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--instrument", help="the cost of this shape over the model, e.g. llama-2-7b")
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--max-queue", type=int)
    parser.add_argument("--no-prefix-reuse", action="store_true")
    parser.add_argument("--count", type=int, help="examples, streams, clients, requests or rounds")
    parser.add_argument(
        "--tokens", type=int, help="of each answer; default 480 for streams, 400 for ttft, 128 for speed"
    )
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--levels", default="1,4,8", help="speed: how many chats at once")
    parser.add_argument("--prompts", type=Path, help="speed: JSONL as in redrafter bench; default: 12 of ours")
    parser.add_argument("--category", default="", help="speed: only prompts whose category starts so")
    parser.add_argument("--limit", type=int, help="speed: only so many of them, spread over all kinds; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the result")
    args = parser.parse_args(arguments)
    for name, value in zip(("count", "max_context", "max_batch", "max_queue"), DEFAULTS[args.what], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.tokens is None:
        args.tokens = {"streams": 480, "ttft": 400}.get(args.what, 128)
    if args.what != "host" and args.out is None:
        parser.error("--out: name the result")
    return args


def main(arguments: list[str]) -> int:
    args = parsed(arguments)
    if args.what == "host":
        return host(args)
    metrics, details = COMMANDS[args.what](args)
    command = shlex.join(["python", "benchmarks/serving.py", *map(portable, arguments)])
    settings = {name: getattr(args, name) for name in (*OPTIONS, "tiny", "paced", "count", "seed")}
    settings["model"] = None if args.tiny or args.paced else portable(args.model)
    settings["drafter"] = portable(args.drafter)
    details = {"settings": {**settings, "plain": True}, **details}
    write_json(args.out, measured(metrics, torch.device(args.device), command, details))
    print(*(f"{name:28}{value:>16.6g} {unit}" for name, (value, unit) in metrics.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
