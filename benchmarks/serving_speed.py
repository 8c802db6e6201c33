"""Tokens per second of chats at once, with speculation and without, and what HTTP costs on top of the engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from serving_host import Host

from redrafter.bench.prompts import load_prompts

OVERHEAD_AT = 8
"""chats at once for which HTTP is compared with the engine alone"""


def speed(
    server: Host, levels: Sequence[int], rounds: int, tokens: int, prompts: Path | None, tell: Callable[[str], None]
) -> tuple[dict[str, tuple[Any, str]], dict[str, Any]]:
    """``rounds`` waves of so many chats at each level, plain and speculative by turns; the medians."""
    asked = [
        {"messages": _messages(p.prompt), "max_tokens": tokens, "temperature": 0, "seed": i}
        for i, p in enumerate(load_prompts(prompts).prompts)
    ]
    metrics: dict[str, tuple[Any, str]] = {}
    rows: list[dict[str, Any]] = []
    with httpx2.Client(timeout=600) as client, ThreadPoolExecutor(max(levels)) as pool:
        for level in levels:
            bodies = [asked[i % len(asked)] for i in range(level)]
            for way in (False, True):  # the first of each kind may have to compile or to allocate
                _wave(client, pool, server.url, bodies, way)
            for number in range(rounds):
                bodies = [asked[(number * level + i) % len(asked)] for i in range(level)]
                row: dict[str, Any] = {"chats": level}
                for way in (False, True) if number % 2 else (True, False):
                    row["speculative" if way else "plain"] = _wave(client, pool, server.url, bodies, way)
                if level == OVERHEAD_AT:
                    row["direct"] = server.direct(bodies)
                row["speedup"] = row["speculative"]["rate"] / row["plain"]["rate"]
                rows.append(row)
                tell(f"{level} chats, round {number + 1}: x{row['speedup']:.3f}")
            metrics |= _summary(level, [row for row in rows if row["chats"] == level])
    metrics["worst"] = (min(metrics[f"speedup_c{level}"][0] for level in levels), "times plain decoding")
    return metrics, {"rounds": rows}


def _summary(level: int, rows: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {
        f"speedup_c{level}": (median(row["speedup"] for row in rows), "times plain decoding"),
        f"plain_c{level}": (median(row["plain"]["rate"] for row in rows), "tokens/s"),
        f"speculative_c{level}": (median(row["speculative"]["rate"] for row in rows), "tokens/s"),
    }
    if level == OVERHEAD_AT:
        # Per token: the adaptive choice of shapes need not give both exactly the same steps.
        over = [r["direct"]["tokens"] / r["direct"]["seconds"] / r["speculative"]["rate"] - 1 for r in rows]
        found[f"http_overhead_b{level}"] = (median(over), "of the engine's own time")
    return found


def _wave(
    client: httpx2.Client, pool: ThreadPoolExecutor, url: str, bodies: Sequence[dict[str, Any]], speculation: bool
) -> dict[str, Any]:
    """All of ``bodies`` at once, streamed. -> seconds, tokens, tokens/s, tokens per step."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        extra = {"stream": True, "stream_options": {"include_usage": True}, "speculation": speculation}
        last = ""
        with client.stream("POST", f"{url}/v1/chat/completions", json={**body, **extra}) as response:
            if response.status_code != 200:
                raise SystemExit(f"the server answered {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = line
        event = json.loads(last.removeprefix("data: "))
        if "usage" not in event:
            raise SystemExit(f"an answer failed: {last}")
        return event

    began = time.perf_counter()
    ends = list(pool.map(ask, bodies))
    seconds = time.perf_counter() - began
    tokens = sum(end["usage"]["completion_tokens"] for end in ends)
    steps = [end["metrics"]["speculative_decoding"]["mean_acceptance_length"] for end in ends]
    return {"seconds": seconds, "tokens": tokens, "rate": tokens / seconds, "tokens_per_step": sum(steps) / len(steps)}


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
