"""Draw docs/ablations.svg from the result of benchmarks/gpu/ablations.py that the figures name; --check: is it stale?

The result is that of the figure ``gain_distillation`` in benchmarks/figures.json; without the figure, no picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
FIGURE, NAME = "gain_distillation", "ablations.svg"
ROW, LEFT, RIGHT, TOP, SCALE = 34, 150, 250, 92, 360
INK, PALE, MAIN, OTHER = "#22272e", "#9aa3ad", "#1f5fae", "#b9c9dd"


def picture(result: dict[str, Any]) -> str:
    """A bar per variant, tokens per step on the questions, longest first; dots are single seeds."""
    rows = sorted(result["variants"], key=lambda row: -row["questions"])
    longest = max(max(row["questions_each"]) for row in rows)
    width, height = LEFT + SCALE + RIGHT, TOP + ROW * len(rows) + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    settings = result["settings"]
    title = f"Tokens per step by variant: {settings['group']}, greedy, {settings['tree_size']} nodes"
    note = f"{settings['steps']} steps each on the same data, {result['provenance']['machine']['device']}; dots: seeds"
    out = [head + ' role="img" font-family="sans-serif" font-size="13">', f"<title>{escape(title)}</title>"]
    out += [f'<rect width="{width}" height="{height}" fill="#ffffff"/>', _text(14, 26, title, size=15)]
    out += [_text(14, 48, note, PALE), _text(LEFT + SCALE + 20, TOP - 12, "seconds, MB read per drafted token", PALE)]
    for i, row in enumerate(rows):
        y = TOP + ROW * i
        bar = SCALE * row["questions"] / longest
        fill = MAIN if row["variant"] == "shipped" else OTHER
        out += [_text(14, y + 18, row["variant"])]
        out += [f'<rect x="{LEFT}" y="{y + 4}" width="{bar:.1f}" height="20" rx="3" fill="{fill}"/>']
        for value in row["questions_each"] if len(row["seeds"]) > 1 else []:
            x = LEFT + SCALE * value / longest
            out += [f'<circle cx="{x:.1f}" cy="{y + 14}" r="3.5" fill="{INK}"/>']
        out += [_text(LEFT + 8, y + 18, f"{row['questions']:.2f}", "#ffffff" if fill == MAIN else INK)]
        cost = f"{row['seconds']:.0f} s, {row['bytes_per_depth'] / 1e6:.1f} MB"
        out += [_text(LEFT + SCALE + 20, y + 18, cost, PALE)]
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, fill: str = INK, size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}">{escape(words)}</text>'


def wanted(root: Path) -> str | None:
    """The picture as it should be; None where no figure names a result."""
    figures = json.loads((root / "benchmarks" / "figures.json").read_text(encoding="utf-8"))
    if FIGURE not in figures:
        return None
    return picture(json.loads((root / figures[FIGURE]["result"]).read_text(encoding="utf-8")))


def main(arguments: list[str], root: Path = ROOT) -> int:
    path, text = root / "docs" / NAME, wanted(root)
    found = path.read_text(encoding="utf-8") if path.is_file() else None
    if arguments == ["--check"]:
        if found != text:
            print(f"docs/{NAME} is stale: run python docs/ablations.py", file=sys.stderr)
        return int(found != text)
    if text is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
