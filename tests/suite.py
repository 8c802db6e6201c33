"""The time of a whole run of the default tests, as a result and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redrafter.bench import provenance, results


def record(root: Path, seconds: float, tests: int, markers: str) -> dict[str, Any]:
    """Write benchmarks/results/suite.json and the key ``suite_seconds``; returns the result."""
    result = {
        "partial": False,
        "summary": {"suite_seconds": seconds, "tests": tests},
        "units": {"suite_seconds": "s", "tests": "tests"},
        "markers": markers,
        "provenance": {
            "source": provenance.source(),
            "command": "REDRAFTER_RECORD_SUITE=1 make test",
            "date": provenance.now(),
            "machine": provenance.machine(torch.device("cpu")),
        },
    }
    path = root / "benchmarks" / "results" / "suite.json"
    results.check_place(path, root, result["provenance"]["source"]["commit"])
    results.write_json(path, result)
    results.write_figures(root, results.figures_of(result, {"suite_seconds": "suite_seconds"}, path, root))
    return result
