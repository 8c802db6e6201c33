"""Fixtures of the server's tests. Without the serve extra only the page's tests are collected."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.server.serving import Running

if any(find_spec(name) is None for name in ("uvicorn", "starlette", "msgspec", "prometheus_client")):
    collect_ignore_glob = ["test_[!p]*.py"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    from tests.server.serving import running

    with running() as run:
        yield run


@pytest.fixture(scope="module")
def server_url(server: Running) -> str:
    """The address of a real server over a tiny model, one for each test module."""
    return server.url
