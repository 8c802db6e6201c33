"""Records as ``measure`` writes them, with round numbers."""

from __future__ import annotations

from typing import Any


def _record(category: str, tokens: int, steps: int, speedup: float, **settings: Any) -> dict[str, Any]:
    return {
        "id": category,
        "category": category,
        "answer_tokens": tokens,
        "plain_answer_tokens": tokens,
        "steps": steps,
        "drafted_steps": steps,
        "accepted_at_depth": [0, 0, 0],
        "tree_nodes": 8 * steps,
        "unmerged_tokens": 20 * steps,
        "looping": False,
        "equal": True,
        "speedup": speedup,
        **settings,
    }


RECORDS = [
    _record("mt_bench/math", 20, 5, 2.5, accepted_at_depth=[5, 5, 2], looping=True),
    _record("mt_bench/stem", 20, 5, 2.0, accepted_at_depth=[5, 5], equal=False, plain_answer_tokens=24),
    _record("qa", 20, 10, 1.0, accepted_at_depth=[8]),
]
BATCHES = [
    {"plain_seconds": [10], "speculative_seconds": [4]},
    {"plain_seconds": [20], "speculative_seconds": [10]},
    {"plain_seconds": [1, 2, 9], "speculative_seconds": [2]},
]
