"""All tests of kernels, in one process with triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be tested")


def test_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("REDRAFTER_RECORD_SUITE", None)
    command = [sys.executable, "-m", "pytest", str(here), "-p", "no:cacheprovider", "--durations=3"]
    done = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=280)
    report = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, report
    assert int(re.findall(r"(\d+) passed", report)[-1]) > 20, report
