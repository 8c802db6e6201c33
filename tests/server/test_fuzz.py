"""A few requests of each kind that schemathesis makes; ``benchmarks/serving.py fuzz`` makes thousands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'redrafter[test]'")

from schemathesis import GenerationMode

from tests.server.client import chat
from tests.server.fuzzing import fuzz, operations
from tests.server.serving import Running, running, tiny_llm


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A context so short that no answer takes long."""
    with running(tiny_llm(context=64)) as run:
        yield run


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_made_from_the_schema_breaks_anything(small: Running, mode: GenerationMode) -> None:
    before = chat(small.url).json()["choices"]
    found = {o.label: fuzz(small.url, o, mode, 15, seed=1) for o in operations(small.url)}
    assert not [failure for one in found.values() for failure in one.failures]
    asked = [one.requests for label, one in found.items() if label.startswith("POST")]
    assert len(asked) == 2 and min(asked) >= 15
    assert chat(small.url).json()["choices"] == before
    small.engine.check()
