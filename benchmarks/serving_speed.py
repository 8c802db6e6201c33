"""Tokens per second of chats at once, with speculation and without, and what HTTP costs on top of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from serving_client import ask_at_once
from serving_host import Host

from redrafter.bench.prompts import BenchPrompt

OVERHEAD_AT = 8
"""chats at once for which HTTP is compared with the engine alone"""
AGAIN = 4
"""Where steps are recorded, a wave in which one was recorded is run again, so often at most: a recording takes as long
as a hundred steps."""

Wave = dict[str, Any]
Bodies = Sequence[dict[str, Any]]


def speed(
    server: Host,
    levels: Sequence[int],
    rounds: int,
    tokens: int,
    prompts: Sequence[BenchPrompt],
    tell: Callable[[str], None],
) -> tuple[dict[str, tuple[Any, str]], dict[str, Any]]:
    """``rounds`` waves of so many chats at each level, in every way by turns; the medians."""
    asked = [
        {"messages": _messages(p.prompt), "max_tokens": tokens, "temperature": 0, "seed": i}
        for i, p in enumerate(prompts)
    ]
    metrics: dict[str, tuple[Any, str]] = {}
    rows: list[dict[str, Any]] = []
    for level in levels:
        ways = _ways(server, direct=level == OVERHEAD_AT)
        for run in ways.values():  # the first of each kind may have to compile or to allocate
            _settled(server, run, [asked[i % len(asked)] for i in range(level)])
        for number in range(rounds):
            bodies = [asked[(number * level + i) % len(asked)] for i in range(level)]
            turn = number % len(ways)
            row: dict[str, Any] = {"chats": level}
            for name in [*ways][turn:] + [*ways][:turn]:
                row[name] = _settled(server, ways[name], bodies)
            row["speedup"] = row["speculative"]["rate"] / row["plain"]["rate"]
            if "direct" in row:
                # Per token: the adaptive choice of shapes need not give both exactly the same steps.
                row["overhead"] = row["direct"]["rate"] / row["speculative"]["rate"] - 1
            rows.append(row)
            tell(f"{level} chats, round {number + 1}: x{row['speedup']:.3f}")
        metrics |= _summary(level, [row for row in rows if row["chats"] == level])
    metrics["worst"] = (min(metrics[f"speedup_c{level}"][0] for level in levels), "times plain decoding")
    return metrics, {"rounds": rows}


def _ways(server: Host, direct: bool) -> dict[str, Callable[[Bodies], Wave]]:
    """``direct`` stands beside the way that it is compared with."""
    ways: dict[str, Callable[[Bodies], Wave]] = {"plain": lambda bodies: _wave(server.url, bodies, False)}
    ways["speculative"] = lambda bodies: _wave(server.url, bodies, True)
    if direct:
        ways["direct"] = lambda bodies: _rated(server.direct(bodies))
    return ways


def _settled(server: Host, run: Callable[[Bodies], Wave], bodies: Bodies) -> Wave:
    """A wave in which no step was recorded, if one of the first few is. ``recorded``: how many were in it."""
    before = server.graphs()
    for _ in range(AGAIN):
        wave = run(bodies)
        after = server.graphs()
        wave["recorded"], before = after - before, after
        if not wave["recorded"]:
            break
    return wave


def _summary(level: int, rows: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {
        f"speedup_c{level}": (median(row["speedup"] for row in rows), "times plain decoding"),
        f"plain_c{level}": (median(row["plain"]["rate"] for row in rows), "tokens/s"),
        f"speculative_c{level}": (median(row["speculative"]["rate"] for row in rows), "tokens/s"),
    }
    if level == OVERHEAD_AT:
        found[f"direct_c{level}"] = (median(row["direct"]["rate"] for row in rows), "tokens/s")
        found[f"http_overhead_b{level}"] = (median(row["overhead"] for row in rows), "of the engine's own time")
    return found


def _wave(url: str, bodies: Bodies, speculation: bool) -> Wave:
    """All of ``bodies`` at once, streamed. -> seconds, tokens, tokens/s, tokens per step."""
    seconds, ends = ask_at_once(url, [{**body, "speculation": speculation} for body in bodies])
    tokens = sum(end["usage"]["completion_tokens"] for end in ends)
    steps = [end["metrics"]["speculative_decoding"]["mean_acceptance_length"] for end in ends]
    return _rated({"seconds": seconds, "tokens": tokens, "tokens_per_step": sum(steps) / len(steps)})


def _rated(wave: Wave) -> Wave:
    return {**wave, "rate": wave["tokens"] / wave["seconds"]}


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
