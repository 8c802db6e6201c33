"""Fixtures of the server's tests; without the serve extra all of them are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

from tests.server.serving import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as run:
        yield run


@pytest.fixture(scope="module")
def server_url(server: Running) -> str:
    """The address of a real server over a tiny model, one for each test module."""
    return server.url
