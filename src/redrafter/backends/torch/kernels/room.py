"""How long a kernel's pipeline may be: what is tuned for an H100 or H200 takes more shared memory than others have."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.runtime import driver

HOPPER_BYTES = 227 << 10
BESIDE_BYTES = 16 << 10
"""For what a kernel keeps beside its blocks: sums of warps, and layouts on their way to another."""


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may take: 227 KB of an H100 or H200, 163 KB of an A100, 99 KB of most others."""
    if device.type != "cuda":
        return HOPPER_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def stages_in(like: Tensor, stages: int, numbers: int, held: int = 0) -> int:
    """``num_stages``, at most ``stages``, of a kernel whose every stage brings so many numbers of ``like``'s type, and
    which holds as many as ``held`` throughout. Of n stages triton keeps n - 1 in memory."""
    size = like.element_size()
    free = _shared_bytes(like.device) - BESIDE_BYTES - held * size
    return max(1, min(stages, 1 + free // (numbers * size)))
