"""What stands between this machine and an NVIDIA GPU, in one line each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from redrafter.errors import OutOfMemory


def cuda_trouble() -> str | None:
    """Why torch cannot use a GPU, and what would help; None if it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it, or use --device cpu"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # an old driver and no driver are told apart by torch's own words
        first_line = (str(error).strip().splitlines() or ["torch does not say why"])[0]
        if "too old" in first_line:
            return f"the NVIDIA driver is too old for CUDA {torch.version.cuda}: update it, or use --device cpu"
        if "no NVIDIA driver" in first_line:
            return "there is no NVIDIA driver: install one if there is a GPU, or use --device cpu"
        return f"CUDA does not start ({first_line}): use --device cpu"
    return "there is no NVIDIA GPU that torch may use (CUDA_VISIBLE_DEVICES?): use --device cpu"


def kernels_trouble() -> str | None:
    """Why our kernels cannot be compiled here, and what would help; None if they can."""
    if not find_spec("triton"):
        return "triton cannot be imported: pip install triton, or use --no-compile"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "triton finds no C compiler: install gcc or clang, or name one in CC, or use --no-compile"
    return None


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """torch's out of memory as ours: one line that names ``what`` did not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the GPU's memory does not hold {what}{_free()}: lower --max-context or --max-batch, close what else uses "
            "the GPU, or take a smaller model or dtype"
        ) from error


def _free() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free)"
