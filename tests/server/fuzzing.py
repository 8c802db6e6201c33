"""Requests that schemathesis makes from /openapi.json, those that fit the schemas and those that do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SHAPE = {"message", "type", "param", "code"}


@dataclass
class Findings:
    """What came of the requests to one operation."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def operations(url: str) -> list[Any]:
    return [one.ok() for one in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]


def fuzz(
    url: str, operation: Any, mode: GenerationMode, count: int, seed: int, tell: Callable[[str], None] = print
) -> Findings:
    """``count`` different requests to one operation. Shrinking is left out: every failure is kept, none raises."""
    found = Findings()
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Unsatisfiable:
        return found

    with requests.Session() as session:

        @seeded(seed)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def ask(case: Any) -> None:
            response = case.call(base_url=url, session=session, timeout=120)
            found.requests += 1
            found.statuses[response.status_code] += 1
            for failure in _failures(case, response):
                found.failures.append(f"{response.status_code} {failure}: {case.as_curl_command()[:2000]}")
                tell(found.failures[-1][:500])

        try:
            ask()
        except Unsatisfiable:  # nothing can be wrong about an operation that takes any text
            assert found.requests == 0
    return found


def _failures(case: Any, response: Any) -> list[str]:
    """What is wrong with a response, in words."""
    wrong = []
    if response.status_code >= 500 and response.status_code != 503:
        wrong.append("a server error")
    try:
        case.validate_response(response, checks=CHECKS)
    except FailureGroup as group:
        wrong += [f"{type(one).__name__} {one}" for one in group.exceptions]
    except Failure as failure:
        wrong.append(f"{type(failure).__name__} {failure}")
    if response.status_code >= 400:
        body = response.json()
        if set(body) != {"error"} or set(body["error"]) != SHAPE:
            wrong.append("an error in another shape")
    return [" ".join(text.split()) for text in wrong]
