"""The process in which kernels are interpreted. It starts with the session and is asked for its result at the end:
tests have one thread, and a machine has more. In a whole run it takes the tests of other folders too, so that two
processes have as much to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = [HERE.parent / "mlx_backend", HERE.parent / "train"]
SHOWN = ["-rfEs", "--disable-warnings"]
TEST = "test_interpreted.py"
LIMIT = 840
"""Seconds that a run waits when it has done the rest."""


class Interpreted:
    KEY = pytest.StashKey["Interpreted"]()

    def __init__(self, folders: list[Path]) -> None:
        """With the tests of these folders."""
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("REDRAFTER_RECORD_SUITE", None)
        # Nice, since the tests beside it may measure time.
        command = [
            "nice",
            sys.executable,
            "-m",
            "pytest",
            *map(str, [HERE, *folders]),
            "-p",
            "no:cacheprovider",
            *SHOWN,
        ]
        self.report = ""
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
        self.report = self._output.read()
        return status, self.report[-6000:]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
