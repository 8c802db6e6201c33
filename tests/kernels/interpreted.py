"""The process in which kernels are interpreted. It starts with the session and is asked for its result at the end:
tests have one thread, and a machine has more."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEST = "test_interpreted.py"
LIMIT = 840
"""Seconds; four minutes on two cores that do nothing else."""


class Interpreted:
    KEY = pytest.StashKey["Interpreted"]()

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("REDRAFTER_RECORD_SUITE", None)
        # Nice, since the tests beside it may measure time.
        command = [
            "nice",
            sys.executable,
            "-m",
            "pytest",
            str(HERE),
            "-p",
            "no:cacheprovider",
            "-rfEs",
            "--disable-warnings",
        ]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command,
            cwd=HERE.parents[1],
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self) -> tuple[int, str]:
        """Its exit status and the end of what it said. Raises TimeoutExpired after LIMIT seconds of waiting."""
        status = self._process.wait(LIMIT)
        self._output.seek(0)
        return status, self._output.read()[-6000:]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
