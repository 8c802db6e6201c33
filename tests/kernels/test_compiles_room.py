"""Pipelines that fit: as they were tuned on an H200, and shorter on cards with less shared memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from redrafter.backends.torch.kernels import attention, cell, early, matmul, room, stream, window
from tests.kernels.test_compiles import Compiled

KERNELS = [
    (attention, "_tree_attention"),
    (cell, "_block_and_cell"),
    (matmul, "_skinny"),
    (stream, "_stream"),
    (window, "_window_attention"),
]
SMALLEST = 99 << 10
"""Bytes that a program may take on most cards but an A100 and an H100."""


class Staged(Compiled):
    """Compiles nothing and says how long the pipelines are."""

    def launch(self, *values: Any, **named: Any) -> None:
        self.done.append(f"{self.kernel.__name__} {named['num_stages']}")


class Sized(Compiled):
    """Compiles for an RTX 4090."""

    def compiled(self, source: ASTSource, options: dict[str, Any]) -> None:
        options.pop("launch_pdl", None)
        compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=options)
        assert compiled.metadata.shared <= SMALLEST, (self.kernel.__name__, compiled.metadata.shared)


def put(monkeypatch: pytest.MonkeyPatch, stand_in: type[Compiled], size: int, done: list[str]) -> None:
    for module, name in KERNELS:
        kernel: Any = getattr(module, name)
        monkeypatch.setattr(module, name, stand_in(kernel.kernel if isinstance(kernel, Compiled) else kernel, done))
    monkeypatch.setattr(room, "_shared_bytes", lambda device: size)


def attend(nodes: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    q, k = torch.zeros(1, heads, nodes, width, dtype=dtype), torch.zeros(1, kv_heads, 900, width, dtype=dtype)
    length, words = torch.zeros(1, dtype=torch.int64), torch.zeros(1, nodes, 2, dtype=torch.int64)
    attention.tree_attention(q, k, k, length, words, 0.1)


def remember(heads: int, width: int, dtype: torch.dtype) -> None:
    q, kept = torch.zeros(1, heads, 9, width, dtype=dtype), torch.zeros(1, heads, 900, width, dtype=dtype)
    window.window_attention((q, q, q), (kept, kept), torch.ones(1, dtype=torch.int64), 512)


def draft(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(rows, size, dtype=dtype), torch.zeros(5 * size, size, dtype=dtype)
    cell.block_and_cell(x, weight, torch.zeros(rows, 2 * size, dtype=dtype), weight[0].expand(3, size).flatten())
    matmul.few_rows(x, weight)


def layer(rows: int, size: int, inner: int) -> None:
    rooms = matmul.Workspace(torch.device("cpu"), 1 << 22)
    x, h = (torch.zeros(rows, n, dtype=torch.bfloat16) for n in (size, inner))
    stream.stream(x, torch.zeros(2 * inner, size, dtype=torch.bfloat16), gated=True, workspace=rooms)
    stream.stream(h, torch.zeros(size, inner, dtype=torch.bfloat16), residual_MN=x, workspace=rooms)
    stream.stream(x, torch.zeros(3 * size, size, dtype=torch.bfloat16), workspace=rooms)


def test_what_is_tuned_for_an_h200_is_launched_as_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[list[str]] = []
    for size in (room.HOPPER_BYTES, 1 << 30):
        tuned.append([])
        put(monkeypatch, Staged, size, tuned[-1])
        for rows in (2, 16, 32, 64, 128):
            for width in (576, 1152):
                draft(rows, width, torch.bfloat16)
            attend(rows, 32, 32, 128, torch.bfloat16)
            attend(rows, 9, 3, 64, torch.bfloat16)
            if rows <= 64:
                layer(rows, 4096, 11008)
                layer(rows, 576, 1536)
        remember(6, 192, torch.bfloat16)
    assert tuned[0] == tuned[1] and len(tuned[0]) == 55
    put(monkeypatch, Staged, SMALLEST, tuned[-1])
    draft(16, 1152, torch.bfloat16)
    assert tuned[-1][-2:] == ["_block_and_cell 5", "_skinny 4"] and "_block_and_cell 9" in tuned[0]


def test_the_card_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": SMALLEST + index})
    monkeypatch.setattr(room, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    assert room._shared_bytes(torch.device("cuda", 1)) == SMALLEST + 1
    assert room._shared_bytes(torch.device("cpu")) == room.HOPPER_BYTES
    room._shared_bytes.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_smaller_card_has_room_too(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tmp_path: Any) -> None:
    """What takes most: trees of 64 nodes over heads of 128, wide drafters, layers of SmolLM2 with 64 rows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(early, "_hopper", lambda device: False)
    done: list[str] = []
    put(monkeypatch, Sized, SMALLEST, done)
    draft(16, 1152, dtype)
    draft(128, 1152, dtype)
    attend(64, 32, 32, 128, dtype)
    remember(6, 192, dtype)
    if dtype == torch.bfloat16:
        layer(64, 576, 1536)
    assert {"_block_and_cell", "_skinny", "_tree_attention", "_window_attention"} <= set(done)
