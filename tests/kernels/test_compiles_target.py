"""The kernels of the target's side compile for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")
from redrafter.backends.torch.kernels import attention, commit, early, matmul, norms, rotate, stream
from tests.kernels.test_compiles import Compiled

KERNELS = [
    (attention, "_tree_attention"),
    (commit, "_write"),
    (commit, "_keep_path"),
    (norms, "_rope_write"),
    (norms, "_add_rms_norm"),
    (norms, "_silu_mul"),
    (matmul, "_gemv"),
    (stream, "_stream"),
    (stream, "_scaled"),
]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    names: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Compiled(getattr(module, name), names))
    return names


def rotation(tokens: int, kv_heads: int, width: int) -> rotate.Rotation:
    cache = commit.KernelCache(1, kv_heads, width, torch.bfloat16, torch.device("cpu"))
    cache.reserve(1, 100)
    cache.place(0, torch.zeros(1, tokens, dtype=torch.int64), 100)
    angle = torch.zeros(1, tokens, width, dtype=torch.bfloat16)
    return rotate.Rotation(angle, angle, cache.layer(0))


@pytest.mark.parametrize(
    ("dtype", "nodes", "width", "softcap"),
    [
        (torch.bfloat16, 1, 128, None),
        (torch.bfloat16, 64, 64, None),
        (torch.float16, 64, 256, 30.0),
        (torch.float32, 64, 128, None),
    ],
)
def test_attention_compiles(done: list[str], dtype: torch.dtype, nodes: int, width: int, softcap: float | None) -> None:
    q, k = torch.zeros(1, 4, nodes, width, dtype=dtype), torch.zeros(1, 2, 900, width, dtype=dtype)
    words, length = torch.zeros(1, nodes, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    attention.tree_attention(q, k, k, length, words, 0.1, softcap)
    assert done == ["_tree_attention"]


def test_attention_of_a_large_tile_over_a_short_text_compiles(done: list[str]) -> None:
    q, k = (torch.zeros(1, 32, n, 128, dtype=torch.bfloat16) for n in (64, 900))
    assert attention.plan_attention(q, k).spread
    words, length = torch.zeros(1, 64, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    attention.tree_attention(q, k, k, length, words, 0.1)
    assert done == ["_tree_attention"]


def test_cache_and_norms_compile(done: list[str]) -> None:
    cache = commit.KernelCache(2, 2, 64, torch.bfloat16, torch.device("cpu"))
    cache.reserve(2, 100)
    cache.place(0, torch.zeros(2, 3, dtype=torch.int64), 100)
    new = torch.zeros(2, 2, 3, 64, dtype=torch.bfloat16)
    cache.update(new, new, 1)
    cache.keep_path(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64))
    qkv, rope = torch.zeros(2, 3, 8 * 64, dtype=torch.bfloat16), torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    norms.rope_write(qkv, rotate.Rotation(rope, rope, cache.layer(0)), norms.HeadNorms(rope[0, 0], rope[0, 0], 1e-5))
    norms.add_rms_norm(qkv[0], qkv[1], qkv[0, 0], 1e-5)
    norms.silu_mul(qkv[0])
    assert done == ["_write", "_keep_path", "_rope_write", "_add_rms_norm", "_silu_mul"]


def test_streams_and_early_starts_compile(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not know early starts: that they compile is their test here."""
    monkeypatch.setattr(early, "_hopper", lambda device: True)
    x, weight = torch.zeros(1, 2048, dtype=torch.bfloat16), torch.zeros(4096, 2048, dtype=torch.bfloat16)
    matmul.few_rows(x, weight, norm=matmul.Norm(x[0], 1e-5), gated=True)
    rooms, many = matmul.Workspace(x.device, 1 << 20), torch.zeros(64, 2048, dtype=torch.bfloat16)
    n = stream.scaled(many, (x[0], 1e-5))
    stream.stream(n, weight, gated=True, workspace=rooms)
    stream.stream(many, weight[:2048], weight[0], residual_MN=many, norm=(x[0], 1e-5), workspace=rooms)
    stream.stream(n, weight, rotation=rotation(64, 8, 128), workspace=rooms)
    assert done == ["_gemv", "_scaled", "_stream", "_stream", "_stream"]
    assert all(stream.plan(64, n, 2048, gated).late for n, gated in ((2048, True), (2048, False)))


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_what_is_read_ahead_compiles(rows: int, done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of SmolLM2-135M, whose weights are on their way before the launch before ends."""
    monkeypatch.setattr(early, "_hopper", lambda device: True)
    bf16: dict[str, Any] = {"dtype": torch.bfloat16}
    x, h, weight = torch.zeros(rows, 576, **bf16), torch.zeros(rows, 1536, **bf16), torch.zeros(3072, 576, **bf16)
    down, rooms = torch.zeros(576, 1536, **bf16), matmul.Workspace(x.device, 1 << 20)
    if rows == 1:
        matmul.few_rows(x, weight, norm=matmul.Norm(x[0], 1e-5), gated=True)
        matmul.few_rows(h, down, residual_MN=x)
        assert done == ["_gemv", "_gemv"]
        return
    assert stream.plan(rows, 1536, 576, True).ahead and stream.plan(rows, 576, 1536, False).ahead
    stream.stream(x, weight, gated=True, workspace=rooms)
    stream.stream(h, down, residual_MN=x, norm=(x[0], 1e-5), workspace=rooms)
    stream.stream(x, weight[:960], weight[0, :1].expand(960), rotation=rotation(rows, 3, 64), workspace=rooms)
    assert done == ["_stream", "_stream", "_stream"]
