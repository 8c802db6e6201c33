"""The model card of a drafter, from the files that its training and its evaluation left behind; nothing by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redrafter.backends.torch.checkpoint import load_drafter, read_metadata
from redrafter.errors import InvalidRequest
from redrafter.models.integrity import read_json
from redrafter.train.files import publish
from redrafter.train.settings import drafter_bytes

LIMITS = """## Limits

- It proposes, it never decides: the text is the model's own with any drafter. A bad guess costs time only.
- It is worth what it has seen: other languages, code, long contexts or other prompts than those it was trained on lower
  the tokens per step.
- Greedy texts are measured here. At a temperature over 0 fewer tokens are accepted.
- Tokens per step is no speed-up: what a step costs depends on the machine; `redrafter bench` measures it there.
"""


_READ = "The bonus token counted, N nodes verified per step. An answer that loops is easy to guess."


def write_card(folder: Path, evaluations: list[Path], generation: Path | None) -> Path:
    """README.md beside the drafter in ``folder`` (a run folder or the drafter's own); returns its path."""
    where = folder / "drafter" if (folder / "drafter" / "config.json").is_file() else folder
    drafter, facts = load_drafter(where), read_metadata(where)
    size = drafter_bytes(drafter.config)
    name = Path(facts.get("model") or where.resolve().name).name
    lines = [f"# A drafter for {name}", ""]
    lines += [f"A recurrent drafter of {size.stored / 1e6:.1f} MB that lets {name} answer sooner with the same text."]
    lines += [f"Per drafted token {size.per_depth / 1e6:.1f} MB of weights are read, the target's head rows included;"]
    lines += [f"once per step {size.per_step / 1e6:.1f} MB more.", ""]
    for path in evaluations:
        lines += [*_evaluation(read_json(path), path.name), ""]
    heldout = facts.get("heldout_tokens_per_step")
    if heldout:
        lines += ["## Held-out texts, tokens per step by tree size", "", *_table([heldout]), ""]
    lines += ["## Data", "", *_data(facts, generation), ""]
    lines += ["## Training", "", *_training(facts), ""]
    lines += ["## Shape", "", "```json", json.dumps(drafter.config.to_dict(), indent=2), "```", "", LIMITS]
    text = "\n".join(lines)
    publish(where / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    return where / "README.md"


def _evaluation(result: dict[str, Any], name: str) -> list[str]:
    """Of ``redrafter eval --json-out``, or the tables of an evaluation that has no categories."""
    tables = result.get("categories") or {k: v for k, v in result.items() if isinstance(v, dict) and "texts" in v}
    if not tables:
        raise InvalidRequest(f"{name} holds no table of tokens per step: give what redrafter eval --json-out wrote")
    rows = []
    for key, table in tables.items():
        sizes = [n for n in table if n.isdigit()]
        row = {"texts of": key, "texts": table["texts"]} | {
            f"N={n}": f"{table[n]['tokens_per_step']:.2f}" for n in sizes
        }
        row["of them loop"] = table["texts"] - table["texts_without_loops"]
        rows.append(row | {f"N={sizes[-1]} without those": f"{table[sizes[-1]]['without_loops']:.2f}"})
    source = {**(result.get("provenance") or {}), **result}
    settings = ", ".join(f"{k} {source[k]}" for k in ("device", "dtype") if k in source)
    note = f" ({settings})" if settings else ""
    asked = result.get("settings", {})
    way = "Greedy answers."
    if asked.get("temperature"):
        beams = "seed-coupled beams" if asked.get("coupled") else "beams that do not see the noise"
        way = f"Answers at temperature {asked['temperature']:g}, {beams}."
    return [
        f"## Tokens per step, `{name}`{note}",
        "",
        f"{way} {_READ}",
        "",
        *_table(rows),
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = list(rows[0])
    body = ["| " + " | ".join(str(row.get(key, "")) for key in head) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def _data(facts: dict[str, Any], generation: Path | None) -> list[str]:
    data = dict(facts.get("data") or {})
    counts = read_json(generation).get("counts", {}) if generation else {}
    rows = [
        {"": k.replace("_", " "), "value": v if isinstance(v, str) else json.dumps(v)}
        for k, v in (data | counts).items()
    ]
    said = ["The texts are the model's own answers; loss is taken on the answers only."]
    return said + (["", *_table(rows)] if rows else [])


def _training(facts: dict[str, Any]) -> list[str]:
    settings = dict(facts.get("settings") or {})
    last = facts.get("trained") or facts.get("last") or {}
    rows = [{"setting": k, "value": json.dumps(v)} for k, v in settings.items()]
    reached = [{"reached": k.replace("_", " "), "value": json.dumps(v)} for k, v in last.items()]
    hashes = [f"{k}: `{facts[k]}`" for k in ("model_sha256", "data_sha256") if k in facts]
    out = [*_table(reached), ""] if reached else []
    return out + hashes + ([""] if hashes else []) + (_table(rows) if rows else [])
