"""The ceilings of CONTRIBUTING.md, counted. Raise one, or add an exception, only in a commit that says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("src", "tests", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py"))
FILE, FUNCTION, ALGORITHM = 400, 60, 750


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function's name and the lines of its body: options and kernels' arguments, one a line, are a table."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.body[0].lineno + 1


def test_files() -> None:
    assert len(SOURCES) > 200
    assert {p.name: n for p in SOURCES if (n := lines(p)) > FILE} == {}


def test_functions() -> None:
    found = [(p.name, name, n) for p in SOURCES for name, n in functions(p.read_text(encoding="utf-8"))]
    assert [f for f in found if f[2] > FUNCTION] == []


def test_the_algorithm() -> None:
    assert 300 < sum(map(lines, (ROOT / "src" / "redrafter" / "algorithm").glob("*.py"))) <= ALGORITHM


@pytest.mark.parametrize(("body", "length"), [("    pass", 1), ("    a = 1\n\n    return a", 3)])
def test_a_body_is_counted_without_its_signature(body: str, length: int) -> None:
    assert list(functions(f"def f(\n    a: int,\n) -> None:\n{body}\n")) == [("f", length)]
