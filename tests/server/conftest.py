"""Fixtures of the server's tests. Without the serve extra all but the page's are skipped, and say so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server.serving import Running

MISSING = [
    name for name in ("uvicorn", "starlette", "msgspec", "prometheus_client", "httpx2") if find_spec(name) is None
]


class _Skipped(pytest.Module):
    """A module that is not even imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(f"no {', '.join(MISSING)}: pip install 'redrafter[serve,test]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The page is tested over a server of its own, which needs nothing."""
    if MISSING and not module_path.name.startswith("test_page"):
        return _Skipped.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    from tests.server.serving import running

    with running() as run:
        yield run


@pytest.fixture(scope="module")
def server_url(server: Running) -> str:
    """The address of a real server over a tiny model, one for each test module."""
    return server.url


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """One row, one place in the queue, and steps of at least 20 ms."""
    from tests.server.serving import running, tiny_llm

    with running(tiny_llm(max_batch=1), max_queue=1) as run:
        step = run.engine.step

        def slower(*given: Any) -> Any:
            time.sleep(0.02)
            return step(*given)

        monkeypatch.setattr(run.engine, "step", slower)
        yield run
