"""All tests of kernels, in one process with triton's interpreter: four minutes, beside the other tests."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")

from tests.kernels.interpreted import LIMIT, Interpreted


@pytest.mark.timeout(LIMIT + 60)
def test_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    status, report = request.config.stash[Interpreted.KEY].result()
    assert status == 0, report
    assert int(re.findall(r"(\d+) passed", report)[-1]) > 20, report
