"""Shared by all tests: one thread, so that sums have one order and two test runs do not fight for the cores."""

from __future__ import annotations

import pytest
import torch

from redrafter.backends.torch.ops import TorchOps

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ops() -> TorchOps:
    return TorchOps()
