"""A result as one HTML page: no script, nothing fetched, charts drawn here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { color: #57606a; margin: .2rem 0 1rem; } table { border-collapse: collapse; } code { overflow-wrap: anywhere; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #d8dee4; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.warn { color: #9a3412; font-weight: 600; } svg { display: block; }
svg text { font: 12px system-ui, sans-serif; fill: #57606a; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } p { color: #9198a1; } svg text { fill: #9198a1; }
  td, th { border-color: #30363d; } .warn { color: #fdba74; }
}
"""
BAR = "#3b82c4"
SLOWER = "#d97706"
WIDTH, LABEL, ROW = 760, 170, 22

KEY_METRICS = (
    ("speedup", "Speed-up over plain decoding"),
    ("speedup_median", "Speed-up, median of prompts"),
    ("tokens_per_step", "Tokens per step"),
    ("plain_tokens_per_second", "Plain decoding"),
    ("speculative_tokens_per_second", "Speculative decoding"),
    ("plain_vs_mlxlm", "Plain decoding over mlx-lm's own, first token on"),
    ("mlxlm_tokens_per_second", "mlx-lm's own, first token on"),
    ("forks", "Answers that differ from plain decoding"),
    ("prompts", "Prompts"),
    ("looping_prompts", "Looping answers"),
    ("tokens_per_step_no_loops", "Tokens per step without them"),
    ("removed_share", "Rows removed by merging prefixes"),
    ("drafter_bytes", "Drafter's weights"),
    ("start_seconds", "Start"),
    ("peak_memory_bytes", "Peak memory"),
    ("memory_overhead", "Peak memory of speculation over plain decoding"),
    ("plain_peak_memory_bytes", "Peak memory of plain decoding"),
    ("speculative_peak_memory_bytes", "Peak memory of speculation"),
    ("drafter_resident_bytes", "The drafter's weights, tables and caches there"),
    ("plain_step_ms", "Plain step"),
    ("plain_bandwidth_share", "Its share of the bandwidth for reading"),
    ("verify_ratio", "Forward over the tree over a token's"),
    ("step_extra_share", "Rest of a step over a plain step"),
    ("read_bandwidth", "Bandwidth for reading"),
)


def shown(value: Any, unit: str) -> str:
    """A value for people: three digits, large bytes as MiB, shares as per cent."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    if unit == "share":
        return f"{value:.1%}"
    number = str(value) if isinstance(value, int) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{number}x" if unit == "x" else f"{number} {unit}"


def key_figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run comes to, in the order in which one wants to know it."""
    summary, units = result["summary"], result["units"]
    found = {key: shown(summary[key], units[key]) for key, _ in KEY_METRICS if key in summary}
    if "forks" in found:
        found["forks"] = forks_said(summary)
    return [(name, found[key]) for key, name in KEY_METRICS if key in found]


def forks_said(summary: Mapping[str, Any]) -> str:
    """Answers that differ from plain decoding, beside those of the control."""
    said = f"{summary['forks']} of {summary['prompts']}"
    if "control_forks" not in summary:
        return said
    return f"{said}, control {summary['control_forks']} of {summary['control_prompts']}"


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    summary, provenance = result["summary"], result["provenance"]
    title = f"{provenance['model']['name']}, {provenance['dtype']}, {provenance['machine']['device']}"
    speedups = sorted((r["speedup"], str(r["id"])) for r in result["prompts"] if r["speedup"] is not None)
    depths = [(f"depth {d}", value) for d, value in enumerate(summary["acceptance_per_depth"], 1)]
    categories = [(name, value or 0.0) for name, value in summary["tokens_per_step_by_category"].items()]
    parts = [
        f"<h1>redrafter bench</h1><p>{escape(title)}</p>",
        '<p class="warn">The run was interrupted: these are the prompts that were finished.</p>'
        if result["partial"]
        else "",
        _table(key_figures(result)),
        "<h2>Speed-up by prompt</h2><p>Whole requests, prefill included; the line is plain decoding.</p>"
        + _columns(speedups)
        if speedups
        else "",
        "<h2>Forks</h2><p>Where an answer first differs from plain decoding, and the plain token's logit minus the "
        "other's.</p>" + _forks(forks)
        if (forks := list(_forks_of(result["prompts"])))
        else "",
        "<h2>Acceptance by depth</h2><p>Share of steps that accepted at least so many drafted tokens.</p>"
        + _bars(depths, "share"),
        "<h2>Tokens per step by category</h2><p>Answer tokens over steps of the model.</p>" + _bars(categories, ""),
        "<h2>A step, part by part</h2><p>Milliseconds of one greedy request, timed apart from the answers.</p>"
        + _bars(list(result["roofline"]["phases_ms"].items()), "ms")
        if "roofline" in result
        else "",
        "<h2>Shapes to choose from</h2><p>What each promised when the run ended: per request, tokens over seconds.</p>"
        + _forecasts(result["cost_table"])
        if result.get("cost_table")
        else "",
        "<h2>How it was measured</h2>" + _table(_how(result), numbers=False),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _how(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    provenance = result["provenance"]
    source, machine = provenance["source"], provenance["machine"]
    commit = str(source["commit"])[:10] + (" (with changes)" if source["dirty"] else "")
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items() if number)
    return [
        ("command", provenance["command"]),
        ("date", provenance["date"]),
        ("code", f"redrafter {source['version']}, commit {commit}"),
        ("device", f"{machine['device']} ({machine['cores']} CPU cores)"),
        ("packages", packages),
        ("beam shape", _listed(result["shape"])),
        *([("control's shape", _listed(result["control"]["shape"]))] if result.get("control") else []),
        ("prompts", f"{provenance['prompts']['name']}, SHA-256 {provenance['prompts']['sha256'][:16]}…"),
        ("settings", _listed(result["settings"])),
    ]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _forks_of(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prompt, fork) of every answer that differs, then of the control's."""
    for key in ("fork", "control_fork"):
        yield from ((str(record["id"]), record[key]) for record in records if record.get(key))


def _forks(forks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("prompt", "way", "position", "logit gap"))
    body = ""
    for name, fork in forks:
        gap = "one had ended" if fork["logit_gap"] is None else f"{fork['logit_gap']:.4f}"
        numbers = "".join(f'<td class="n">{value}</td>' for value in (fork["position"], gap))
        body += f"<tr><td>{escape(name)}</td><td>{fork['other_is']}</td>{numbers}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _forecasts(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for every number of requests and shape; what was chosen is bold."""
    head = "".join(f"<th>{title}</th>" for title in ("requests", "shape", "ms", "tokens", "tokens/s", "steps seen"))
    body = ""
    for line in lines:
        shape, seconds, tokens = line["config"], line["step_seconds"], line["tokens_per_step"]
        beams = (
            f"{shape['beam_width']} x {shape['branching']}, {shape['draft_length']} deep, {shape['tree_size']} nodes"
        )
        numbers = (f"{1e3 * seconds:.2f}", f"{tokens:.2f}", f"{tokens / seconds:.0f}", str(line["observed"]))
        name = beams if shape["tree_size"] > 1 else "plain"
        cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
        name = f"<b>{name}</b>" if line["chosen"] else name
        body += f"<tr><td>at most {line['rows']}</td><td>{name}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _table(rows: Sequence[tuple[str, str]], numbers: bool = True) -> str:
    kind = ' class="n"' if numbers else ""
    cells = "".join(f"<tr><th>{escape(name)}</th><td{kind}>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _bars(rows: Sequence[tuple[str, float]], unit: str) -> str:
    """One horizontal bar per row, its value beside it."""
    most = max((value for _, value in rows), default=0.0) or 1.0
    drawn = []
    for i, (name, value) in enumerate(rows):
        y, length = i * ROW, (WIDTH - LABEL - 70) * value / most
        text = shown(value, unit) if unit else f"{value:.2f}"
        drawn.append(
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" fill="{BAR}"/>'
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{text}</text>'
        )
    return _svg(len(rows) * ROW, drawn)


def _columns(values: Sequence[tuple[float, str]], height: int = 180) -> str:
    """One column per prompt from the slowest to the fastest; slower than plain decoding is orange."""
    most = max(1.0, values[-1][0])
    room = WIDTH - 40
    step = room / len(values)
    drawn = []
    for i, (value, name) in enumerate(values):
        tall = height * value / most
        tip = f"<title>{escape(name)}: {value:.2f}x</title>"
        drawn.append(
            f'<rect x="{40 + i * step:.1f}" y="{10 + height - tall:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{tall:.1f}" fill="{BAR if value >= 1 else SLOWER}">{tip}</rect>'
        )
    for mark in (1.0, most) if most > 1.1 else (1.0,):  # two labels must not overlap
        y = 10 + height - height * mark / most
        drawn.append(f'<text x="32" y="{y + 4:.1f}" text-anchor="end">{mark:.1f}x</text>')
    y = 10 + height - height / most
    drawn.append(f'<line x1="40" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#57606a" stroke-dasharray="4 3"/>')
    return _svg(height + 14, drawn)


def _svg(height: int, drawn: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img">{"".join(drawn)}</svg>'
