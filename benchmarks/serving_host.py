"""A server in a process of its own, for ``serving.py``: clients in another process do not take its time or memory.

The child prints one JSON line, ``{"url", "pid"}``; then, for every line of requests on its stdin, it runs them on the
engine itself, without HTTP, and prints ``{"seconds", "tokens", "steps", "graphs"}``; no requests just tell ``graphs``.
It ends with its stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from redrafter.llm import LLM
from redrafter.params import SamplingParams
from redrafter.server.run import settle_memory
from tests.server.paced import paced_llm
from tests.server.serving import running, tiny_llm


def open_llm(args: argparse.Namespace) -> LLM:
    """The tiny random model, the stand-in for a GPU, a model of the user's, or the instrument over it
    (``redrafter.bench.instrument``)."""
    if args.paced:
        torch.set_num_threads(1)
        return paced_llm(context=args.max_context, max_batch=args.max_batch)
    if args.tiny:
        torch.set_num_threads(1)
        return tiny_llm(context=args.max_context, max_batch=args.max_batch)
    if args.instrument is None:
        return LLM.from_pretrained(
            args.model,
            args.drafter,
            dtype=args.dtype,
            device=args.device,
            max_context=args.max_context,
            max_batch=args.max_batch,
            threads=args.threads,
        )
    from redrafter.backends.torch.load import DTYPES
    from redrafter.bench.instrument import open_instrument
    from redrafter.models import resolve, resolve_drafter

    files = resolve(args.model)
    return open_instrument(
        args.instrument,
        files,
        resolve_drafter(args.drafter, files),
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        compile=True,
        max_context=args.max_context,
        max_batch=args.max_batch,
        config=None,
    )


def host(args: argparse.Namespace) -> int:
    llm = open_llm(args)
    llm.engine.prefix_reuse = not args.no_prefix_reuse
    with running(llm, max_queue=args.max_queue) as run:
        settle_memory()
        print(json.dumps({"url": run.url, "pid": os.getpid()}), flush=True)
        for line in sys.stdin:
            print(json.dumps(direct(llm, json.loads(line))), flush=True)
    return 0


def direct(llm: LLM, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The requests of ``bodies`` on the engine, all at once; the server must be idle."""
    engine = llm.engine
    began = time.perf_counter()
    for index, body in enumerate(bodies):
        params = SamplingParams(max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        engine.add(f"direct-{index}", llm.tokenizer.encode_chat(body["messages"]), params)
    tokens = steps = 0
    while engine.has_work:
        steps += 1
        for event in engine.step():
            assert event.error is None, event.error
            tokens += len(event.tokens)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "steps": steps, "graphs": engine.backend.graphs or 0}


class Host:
    """The child, seen from the parent."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start: its error stands above")
        facts = json.loads(line)
        self.url: str = facts["url"]
        self.pid: int = facts["pid"]

    def direct(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(bodies) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def graphs(self) -> int:
        """Steps recorded so far; 0 where they are not recorded."""
        return int(self.direct([])["graphs"])

    def resident_bytes(self) -> int:
        """Memory that the server holds now (Linux)."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError(f"process {self.pid} tells no VmRSS")


@contextmanager
def hosted(arguments: Sequence[str]) -> Iterator[Host]:
    """A server of ``serving.py host ARGUMENTS``."""
    script = Path(__file__).with_name("serving.py")
    command = [sys.executable, str(script), "host", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Host(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
