"""Write the table of figures into README.md from benchmarks/figures.json; with --check, only say whether it is stale.

A figure is ``key -> {value, unit, result, command, device, commit, date}``; ``result`` is the path of the JSON of the
run that measured it. Nothing is written by hand between the two markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
FIELDS = ("value", "unit", "result", "command", "device", "commit", "date")
# What a key means, in words. A key that is not here is shown as it is.
MEANING = {
    "tau_mtbench_greedy_n64": "tokens per step (bonus counted), MT-bench first turns, greedy, at most 64 nodes",
    "tau_mtbench_t1_n64": "the same at temperature 1, seed-coupled beams",
    "tree_tokens_removed_share": "share of tokens that merging shared prefixes removes",
    "cpu_speedup_mtbench_bf16": "speculative over plain decoding, two CPU cores, bf16, same engine",
    "cpu_forks_bf16": "answers that differ from plain decoding, two CPU cores, bf16",
    "exact_fp32_prompts": "prompts compared with plain decoding, float32",
    "exact_fp32_forks": "of these, greedy answers that differ",
    "exact_fp32_forks_t1": "of these, answers at temperature 1 that differ",
    "suite_seconds": "time of the test suite",
}


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table, sorted by key. ValueError names a figure with a missing field."""
    if not figures:
        return "No figure has been measured for this version yet."
    rows = ["| what | value | device | measured by | date, commit |", "|---|---|---|---|---|"]
    for key, figure in sorted(figures.items()):
        missing = [field for field in FIELDS if field not in figure]
        if missing:
            raise ValueError(f"figure {key!r} lacks {', '.join(missing)}: measure it again with its command")
        value = figure["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(
            f"| {MEANING.get(key, f'`{key}`')} | {shown} {figure['unit']} | {figure['device']} "
            f"| `{figure['command']}` ([result]({figure['result']})) | {figure['date']}, {str(figure['commit'])[:10]} |"
        )
    return "\n".join(rows)


def updated(readme: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with everything between the markers replaced. ValueError unless each marker is there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each, in this order: put them back")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str], root: Path = ROOT) -> int:
    readme = root / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = updated(old, json.loads((root / "benchmarks" / "figures.json").read_text(encoding="utf-8")))
    if arguments == ["--check"]:
        if old != new:
            print("README.md is stale: run python docs/figures.py", file=sys.stderr)
        return int(old != new)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
