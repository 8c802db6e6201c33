"""Without a GPU kernels run in triton's interpreter. That is chosen when triton is imported, so these tests have a
process of their own, which ``test_interpreted.py`` starts; with a GPU those that can run there as they are."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = ["test_interpreted.py"] if INTERPRETED else []
collect_ignore_glob = ["test_compiles*.py"] if INTERPRETED else ["test_kernel_*.py"]
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob.append("test_kernels_*.py")

if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """A loop's bound may be a tensor of one number; numpy 2.4 no longer makes an int of the array in it."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
