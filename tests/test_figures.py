"""The README's figures are those of benchmarks/figures.json, and its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from redrafter.cli import COMMANDS
from redrafter.cli.bench import bench
from redrafter.cli.chat import chat
from redrafter.cli.data import data
from redrafter.cli.generate import generate
from redrafter.cli.serve import serve
from redrafter.cli.train import train

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
assert SPEC is not None and SPEC.loader is not None
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)

FIGURE = {
    "value": 3.0212345,
    "unit": "tokens",
    "result": "benchmarks/results/a.json",
    "command": "redrafter bench",
    "device": "2 CPU cores",
    "commit": "0123456789abcdef",
    "date": "2026-11-24",
}


def test_the_readme_is_not_stale() -> None:
    assert figures.main(["--check"]) == 0, "run python docs/figures.py"


def test_a_changed_figure_makes_the_readme_stale_and_writing_it_cures_that(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"a\n{figures.BEGIN}\nold\n{figures.END}\nb\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "figures.json").write_text("{}")
    assert figures.main(["--check"], tmp_path) == 1
    assert figures.main([], tmp_path) == 0
    assert figures.main(["--check"], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"a\n{figures.BEGIN}\n") and text.endswith(f"{figures.END}\nb\n") and "old" not in text


def test_a_figure_is_a_row_with_its_command_and_result() -> None:
    row = figures.table({"tau_mtbench_greedy_n64": FIGURE, "another": FIGURE}).splitlines()[2:]
    assert row[0].startswith("| `another` | 3.021 tokens | 2 CPU cores |")
    assert row[1].startswith("| tokens per step (bonus counted), MT-bench")
    assert "`redrafter bench` ([result](benchmarks/results/a.json)) | 2026-11-24, 0123456789 |" in row[1]


def test_a_figure_without_provenance_and_a_readme_without_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="'tau' lacks command, commit"):
        figures.table({"tau": {k: v for k, v in FIGURE.items() if k not in ("command", "commit")}})
    with pytest.raises(ValueError, match="once each"):
        figures.updated("no markers", {})


def test_commands_and_options_named_in_the_readme_exist() -> None:
    # Without the table: it names scripts of benchmarks/, too.
    readme = figures.updated((ROOT / "README.md").read_text(encoding="utf-8"), {})
    assert set(re.findall(r"^(?:\$ )?redrafter (\w+)", readme, re.MULTILINE)) <= set(COMMANDS)
    hints = {
        k: v for command in (bench, chat, data, generate, serve, train) for k, v in command.__annotations__.items()
    }
    named = {option for hint in hints.values() for option in re.findall(r"--[\w-]+", str(hint))}
    named |= {f"--{name.replace('_', '-')}" for name in hints} | {"--debug", "--json", "--version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", readme)) <= named


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_files_linked_from_the_readme_exist(path: str) -> None:
    assert (ROOT / path).exists(), path
