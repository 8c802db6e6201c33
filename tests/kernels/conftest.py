"""Without a GPU kernels run in triton's interpreter. That is chosen when triton is imported, so these tests have a
process of their own, which ``test_interpreted.py`` starts; with a GPU those that can run there as they are."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = ["test_interpreted.py"] if INTERPRETED else []
collect_ignore_glob = [] if INTERPRETED else ["test_kernel_*.py"]
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob.append("test_kernels_*.py")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
