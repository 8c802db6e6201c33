"""Results and figures on disk: each file appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redrafter.bench.metrics import NEEDS_PLAIN
from redrafter.bench.provenance import machine, now, source
from redrafter.errors import InvalidRequest

FIGURES = Path("benchmarks") / "figures.json"
KEY = re.compile(r"[a-z][a-z0-9_]*")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written aside, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def measured(
    metrics: Mapping[str, tuple[Any, str]], device: Any, command: str, details: Mapping[str, Any], partial: bool = False
) -> dict[str, Any]:
    """A result of another command than ``bench``, in the same form: ``metrics`` are name -> (value, unit), ``details``
    whatever else is worth keeping. ``redrafter bench --report FILE --figure KEY=METRIC`` takes figures from it."""
    provenance = {"source": source(), "command": command, "date": now(), "machine": machine(device)}
    return {
        "partial": partial,
        "summary": {name: value for name, (value, _) in metrics.items()},
        "units": {name: unit for name, (_, unit) in metrics.items()},
        "provenance": provenance,
        **details,
    }


def read_result(path: Path) -> dict[str, Any]:
    """A result that ``bench`` wrote. InvalidRequest for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as a result ({error}): name a JSON that bench wrote") from error
    if not isinstance(result, dict) or not {"summary", "units", "provenance", "partial"} <= result.keys():
        raise InvalidRequest(f"{path} is not a result of bench (no summary, units, provenance, partial): name another")
    return result


def parse_figures(asked: Sequence[str], known: Iterable[str], plain: bool) -> dict[str, str]:
    """``KEY=METRIC`` each -> {key: metric}. InvalidRequest for a metric that the run is not going to have."""
    names = list(known)
    wanted = {}
    for text in asked:
        key, equals, metric = text.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise InvalidRequest(f"--figure {text!r} is not KEY=METRIC: a key is lower-case letters, digits and _")
        if not plain and metric in NEEDS_PLAIN:
            raise InvalidRequest(f"--figure {text!r}: {metric} compares with plain decoding; drop --no-plain")
        if metric not in names:
            raise InvalidRequest(
                f"--figure {text!r}: {metric!r} is not a metric of this run: use one of {', '.join(names)}"
            )
        wanted[key] = metric
    return wanted


def figures_of(result: Mapping[str, Any], wanted: Mapping[str, str], result_path: Path, root: Path) -> dict[str, Any]:
    """The entries of figures.json for these keys. InvalidRequest: a partial run, no such value, no commit, a result
    that lies outside of ``root``."""
    provenance = result["provenance"]
    if result["partial"]:
        raise InvalidRequest(
            f"{result_path.name} is of a run that was interrupted: figures need a finished one; run it again"
        )
    check_place(result_path, root, provenance["source"]["commit"])
    figures = {}
    for key, metric in wanted.items():
        value = result["summary"].get(metric)
        if value is None:
            raise InvalidRequest(f"{key}: {metric} has no value in {result_path.name}: no prompt of that kind was run")
        figures[key] = {
            "value": value,
            "unit": result["units"][metric],
            "result": result_path.resolve().relative_to(root.resolve()).as_posix(),
            "command": provenance["command"],
            "device": provenance["machine"]["device"],
            "commit": provenance["source"]["commit"],
            "date": provenance["date"][:10],
        }
    return figures


def check_place(result_path: Path, root: Path, commit: str | None) -> None:
    """A figure needs a commit, and a result inside of the checkout that it is an index of."""
    if commit is None:
        raise InvalidRequest("--figure needs a commit: run in a git checkout, or set REDRAFTER_COMMIT to its SHA")
    if not result_path.resolve().is_relative_to(root.resolve()):
        raise InvalidRequest(
            f"--figure needs a result inside of the checkout and --out is {result_path.parent}: leave it out"
        )


def write_figures(root: Path, figures: Mapping[str, Any]) -> None:
    """Put the keys into benchmarks/figures.json; the others stay."""
    path = root / FIGURES
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, dict(sorted({**old, **figures}.items())))
