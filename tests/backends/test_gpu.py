"""What is said where a GPU, its driver, triton, a compiler or memory is missing; no GPU is needed to say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from redrafter.backends.torch import gpu
from redrafter.backends.torch.graph import GraphRunner
from redrafter.backends.torch.load import TorchBackend, make_target, pick_device
from redrafter.engine import first_state
from redrafter.errors import InvalidRequest, OutOfMemory
from redrafter.params import PLAIN
from tests.tiny import make_model

OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update\nyour driver."
NONE = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU."


def raising(error: Exception) -> Any:
    def function(*arguments: Any, **settings: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("built", "init", "says"),
    [
        (None, None, "is built without CUDA: install a build with it"),
        ("13.0", raising(RuntimeError(OLD)), "the NVIDIA driver is too old for CUDA 13.0: update it"),
        ("13.0", raising(RuntimeError(NONE)), "there is no NVIDIA driver: install one"),
        ("13.0", raising(RuntimeError("CUDA unknown error\nmore")), "CUDA does not start (CUDA unknown error)"),
        ("13.0", lambda: None, "there is no NVIDIA GPU that torch may use"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line(monkeypatch, built: str | None, init: Any, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(InvalidRequest) as raised:
        pick_device("cuda")
    message = str(raised.value)
    assert message.startswith("device='cuda': ") and says in message
    assert message.endswith("use --device cpu") and "\n" not in message


def test_no_trouble_with_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.cuda_trouble() is None
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_a_missing_compiler_and_a_missing_triton(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "no C compiler: install gcc or clang" in str(gpu.kernels_trouble())
    monkeypatch.setenv("CC", "/opt/cc")
    assert gpu.kernels_trouble() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert gpu.kernels_trouble() is None
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert str(gpu.kernels_trouble()).startswith("triton cannot be imported: pip install triton, or use --no-compile")


def test_out_of_memory_names_what_did_not_fit_wherever_it_comes(monkeypatch) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    backend = TorchBackend(make_target(make_model("llama")), None, 64, [])
    backend.reserve(1, 16)
    runner = GraphRunner(raising(full), lambda run: (run, None), lambda: 1)
    state = first_state(backend, PLAIN, backend.no_features(), root=1, length=3)
    with pytest.raises(OutOfMemory, match="does not hold a graph of a step of 1 rows and 1 nodes: lower --max-context"):
        runner(state, PLAIN)
    assert len(runner) == 0
    monkeypatch.setattr(torch, "zeros", raising(full))
    with pytest.raises(OutOfMemory, match="does not hold a key/value cache of 2 rows of 48 tokens") as raised:
        backend.reserve(2, 48)
    assert "\n" not in str(raised.value)
