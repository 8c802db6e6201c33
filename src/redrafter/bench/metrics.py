"""From what was measured prompt by prompt to a run's summary. Plain arithmetic on the records of ``measure``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from redrafter.bench.mlx_lm_baseline import against

LOOP_SHARE = 0.6
"""An answer with a smaller share of distinct 4-grams is looping."""

MT_BENCH = "mt_bench"
OTHER = "other"

# Name -> unit. What each one means is said in benchmarks/README.md.
NEEDS_PLAIN = {
    "speedup": "x",
    "speedup_q1": "x",
    "speedup_median": "x",
    "speedup_q3": "x",
    "speedup_per_token": "x",
    "overhead": "x",
    "plain_seconds": "s",
    "plain_tokens_per_second": "tokens/s",
    "forks": "answers",
    "equal_prompts": "prompts",
}
NEEDS_CUDA = {
    "plain_step_ms": "ms",
    "plain_bandwidth_share": "share",
    "verify_ratio": "x",
    "step_extra_share": "share",
    "step_ratio": "x",
    "read_bandwidth": "GB/s",
    "copy_bandwidth": "GB/s",
    "bytes_per_plain_step": "bytes",
    "plain_peak_memory_bytes": "bytes",
    "speculative_peak_memory_bytes": "bytes",
    "memory_overhead": "x",
    "memory_overhead_bytes": "bytes",
    "drafter_resident_bytes": "bytes",
    "spare_cache_bytes": "bytes",
}
NEEDS_CONTROL = {"control_forks": "answers", "control_prompts": "prompts"}
NEEDS_BASELINE = {
    "plain_vs_mlxlm": "x",
    "mlxlm_tokens_per_second": "tokens/s",
    "mlxlm_equal_prompts": "prompts",
}
ALWAYS = {
    "prompts": "prompts",
    "answer_tokens": "tokens",
    "steps": "steps",
    "speculative_seconds": "s",
    "speculative_tokens_per_second": "tokens/s",
    "tokens_per_step": "tokens/step",
    "tokens_per_step_no_loops": "tokens/step",
    "tokens_per_step_looping": "tokens/step",
    "looping_prompts": "prompts",
    "removed_share": "share",
    "drafter_bytes": "bytes",
    "start_seconds": "s",
    "peak_memory_bytes": "bytes",
}


def known_metrics(
    groups: Iterable[str], plain: bool, baseline: bool = False, cuda: bool = False, control: bool = False
) -> dict[str, str]:
    """Every single-number metric -> its unit, of a run over prompts of these groups, with or without plain runs, a
    baseline, an NVIDIA GPU, and the control for forks."""
    names = sorted(set(groups))
    by_group = [*names, *([OTHER] if any(name != MT_BENCH for name in names) else [])]
    compared = {
        **(NEEDS_PLAIN if plain else {}),
        **(NEEDS_BASELINE if baseline else {}),
        **(NEEDS_CUDA if cuda else {}),
        **(NEEDS_CONTROL if control else {}),
    }
    return {**compared, **ALWAYS, **{f"tokens_per_step.{g}": "tokens/step" for g in by_group}}


def looping(token_ids: Sequence[int]) -> bool:
    """Fewer than 60 % of the answer's 4-grams are distinct; never of an answer shorter than four tokens."""
    grams = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    return bool(grams) and len(set(grams)) < LOOP_SHARE * len(grams)


def first_fork(a: Sequence[int], b: Sequence[int]) -> int | None:
    """First position at which two answers differ, or end differently; None if they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def summarise(records: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of the finished prompts; None where nothing was there to divide by.

    records: one per prompt; batches: the wall seconds of whole batches, one entry per repetition each way.
    """
    tokens, steps = _sum(records, "answer_tokens"), _sum(records, "steps")
    seconds = sum(statistics.median(b["speculative_seconds"]) for b in batches)
    loops = [r for r in records if r["looping"]]
    summary: dict[str, Any] = {
        "prompts": len(records),
        "answer_tokens": tokens,
        "steps": steps,
        "speculative_seconds": seconds,
        "speculative_tokens_per_second": _ratio(tokens, seconds),
        "tokens_per_step": tokens_per_step(records),
        "tokens_per_step_no_loops": tokens_per_step([r for r in records if not r["looping"]]),
        "tokens_per_step_looping": tokens_per_step(loops),
        "looping_prompts": len(loops),
        "removed_share": _one_minus(_ratio(_sum(records, "tree_nodes"), _sum(records, "unmerged_tokens"))),
        "acceptance_per_depth": acceptance_per_depth(records),
        "tokens_per_step_by_category": _by(records, lambda r: str(r["category"])),
    }
    by_group = _by(records, lambda r: str(r["category"]).partition("/")[0])
    others = [r for r in records if str(r["category"]).partition("/")[0] != MT_BENCH]
    if others:
        by_group[OTHER] = tokens_per_step(others)
    summary |= {f"tokens_per_step.{group}": value for group, value in by_group.items()}
    if records and all(r["equal"] is not None for r in records):
        summary |= _against_plain(records, batches, summary)
    if records and all("mlxlm_equal" in r for r in records):
        summary |= against(records)
    controlled = [r for r in records if "control_fork" in r]
    if controlled:
        summary["control_prompts"] = len(controlled)
        summary["control_forks"] = sum(r["control_fork"] is not None for r in controlled)
    return summary


def _against_plain(
    records: Sequence[Mapping[str, Any]], batches: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> dict[str, Any]:
    seconds = sum(statistics.median(b["plain_seconds"]) for b in batches)
    rate = _ratio(_sum(records, "plain_answer_tokens"), seconds)
    low, middle, high = quartiles([r["speedup"] for r in records])
    equal = sum(bool(r["equal"]) for r in records)
    drafted = summary["speculative_tokens_per_second"]
    per_token = _ratio(drafted, rate) if drafted is not None and rate is not None else None
    return {
        "speedup": _ratio(seconds, summary["speculative_seconds"]),
        "speedup_q1": low,
        "speedup_median": middle,
        "speedup_q3": high,
        "speedup_per_token": per_token,
        "overhead": _ratio(summary["tokens_per_step"], per_token) if summary["tokens_per_step"] and per_token else None,
        "plain_seconds": seconds,
        "plain_tokens_per_second": rate,
        "forks": len(records) - equal,
        "equal_prompts": equal,
    }


def tokens_per_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Answer tokens over the target's steps, both summed first.

    The end-of-text token is not an answer token; the step that found it is a step.
    """
    return _ratio(_sum(records, "answer_tokens"), _sum(records, "steps"))


def acceptance_per_depth(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """[d]: share of drafted steps that accepted at least d + 1 drafted tokens."""
    counts = [sum(column) for column in zip_longest(*(r["accepted_at_depth"] for r in records), fillvalue=0)]
    steps = _sum(records, "drafted_steps")
    return [count / steps for count in counts] if steps else []


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value three times that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _by(records: Sequence[Mapping[str, Any]], key: Any) -> dict[str, float | None]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return {name: tokens_per_step(some) for name, some in sorted(found.items())}


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(r[key] for r in records)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value
