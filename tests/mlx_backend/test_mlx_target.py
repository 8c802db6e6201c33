"""The walk over mlx-lm's layers: its own forward's logits, and torch's from the same files."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import json
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

import torch

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.base import PREFILL_CHUNK
from redrafter.backends.mlx.load import load_target, pick_dtype, use_device
from redrafter.backends.mlx.target import MLXTarget
from redrafter.errors import CorruptModel, InvalidRequest, OutOfMemory, UnsupportedModel
from tests.mlx_backend.tiny import (
    FAMILIES,
    FEATURES,
    LLAMA3,
    config_of,
    open_target,
    open_torch,
    write_model,
    write_quantised,
)
from tests.tiny import VOCAB, WIDTH

IDS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(1)).tolist()
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0}}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def prefill(target: MLXTarget, ids: list[int]) -> mx.array:
    """Features [T, F] of all tokens, read in two pieces."""
    target.cache.reserve(1, len(ids) + 32)
    cut = len(ids) // 3
    first = target.prefill(0, mx.array(ids[:cut]), 0)
    return mx.concatenate([first, target.prefill(0, mx.array(ids[cut:]), cut)])


def logits_of(target: MLXTarget, features: mx.array) -> mx.array:
    return target._logits(features[..., :WIDTH])


def worst(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a - b).max())


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_mlx_lm_s_and_torch_s(name: str, tmp_path: Path) -> None:
    """A rotary base or a tied head that mlx-lm does not read from these files would show against torch."""
    family, overrides = VARIANTS[name]
    folder = write_model(tmp_path, family, **overrides)
    target = open_target(folder)
    ours = logits_of(target, prefill(target, IDS))
    assert worst(ours, target.model(mx.array([IDS]))[0]) < 1e-5
    theirs = open_torch(folder, None).target
    theirs.cache.reserve(1, 32)
    features = theirs.prefill(0, torch.tensor(IDS), 0)
    expected = theirs.model.get_output_embeddings()(features[:, :WIDTH])
    assert float(expected.std()) > 0.1
    # Features grow to 30 and more with these weights, and rounding errors with them.
    assert worst(ours, mx.array(expected.numpy())) < 1e-5 * max(1.0, float(expected.abs().max()))
    assert worst(prefill(target, IDS), mx.array(features.numpy())) < 1e-5 * float(features.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_gives_mlx_lm_s_logits(bits: int, tmp_path: Path) -> None:
    folder = write_quantised(tmp_path / "packed", write_model(tmp_path / "whole", "llama"), bits)
    target = open_target(folder)
    assert target.model.model.layers[0].mlp.up_proj.bits == bits
    ours = logits_of(target, prefill(target, IDS))
    assert worst(ours, target.model(mx.array([IDS]))[0]) < 1e-5
    whole = open_target(tmp_path / "whole")
    assert worst(ours, logits_of(whole, prefill(whole, IDS))) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_of_a_tree_sees_its_own_path(family: str, tmp_path: Path) -> None:
    """Two rows of different lengths; each node's logits and features are those of its path read as a text."""
    target = open_target(write_model(tmp_path, family))
    target.cache.reserve(2, 64)
    prompts = [IDS[:9], IDS[5:19]]
    for row, prompt in enumerate(prompts):
        target.prefill(row, mx.array(prompt), 0)
    parent = [0, 0, 0, 1, 1, 2, 3]
    tokens = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26]]
    paths = [[0]]
    for node in range(1, 7):
        paths.append([*paths[parent[node]], node])
    mask = [[j in path for j in range(7)] for path in paths]
    tree = TokenTree(
        mx.array(tokens),
        mx.array([parent] * 2),
        mx.array([[len(path) - 1 for path in paths]] * 2),
        mx.array([mask] * 2),
        mx.ones((2, 7), dtype=mx.bool_),
    )
    lengths = mx.array([len(p) for p in prompts])
    logits, features = target.verify(tree, lengths)
    assert logits.shape == (2, 7, VOCAB) and logits.dtype == mx.float32
    assert features.shape == (2, 7, target.feature_size)
    for row, prompt in enumerate(prompts):
        for node, path in enumerate(paths):
            text = [*prompt, *(tokens[row][n] for n in path)]
            assert worst(logits[row, node], target.model(mx.array([text]))[0, -1]) < 1e-5
    deep = paths[6]
    path = mx.array([deep, [0, 2, 5, 5]])
    accepted = Accepted(path, mx.array([3, 2]), path[:, 0], path, path[:, 0] == 0)
    target.commit(lengths, accepted)
    for row, kept in enumerate((deep, [0, 2, 5])):
        text = [*prompts[row], *(tokens[row][n] for n in kept), 50]
        one = TokenTree(
            *(x[:, :1] for x in (mx.array([[50]] * 2), tree.parent, tree.depth)), tree.mask[:, :1, :1], None
        )
        after, _ = target.verify(one, lengths + mx.array([4, 3]))
        assert worst(after[row, 0], target.model(mx.array([text]))[0, -1]) < 1e-5


def test_the_order_of_feature_layers_is_the_one_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    a, b = (prefill(open_target(folder, layers), IDS) for layers in ((0, 2), (2, 0)))
    assert worst(a[:, :WIDTH], b[:, :WIDTH]) == 0
    assert worst(a[:, WIDTH : 2 * WIDTH], b[:, 2 * WIDTH :]) == 0
    assert worst(a[:, WIDTH : 2 * WIDTH], b[:, WIDTH : 2 * WIDTH]) > 0.1


def test_a_prompt_longer_than_a_chunk(tmp_path: Path) -> None:
    from redrafter.backends.mlx.load import MLXBackend

    folder = write_model(tmp_path, "llama", max_position_embeddings=1024)
    target = open_target(folder)
    backend = MLXBackend(target, None, 1000, [])
    ids = (IDS * 30)[: PREFILL_CHUNK + 70]
    backend.reserve(1, len(ids) + 1)
    last = backend.prefill(0, ids)
    assert worst(logits_of(target, last), target.model(mx.array([ids]))[0, -1]) < 2e-5


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gemma2", {}, "gemma2"),
        ("phi3", {}, "phi3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "DynamicNTK"),
    ],
)
def test_what_it_would_compute_wrongly_is_refused_by_name(
    family: str, overrides: dict, message: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, family, **overrides)
    with pytest.raises(UnsupportedModel, match=message) as raised:
        open_target(folder)
    assert "--backend torch" in str(raised.value) and "\n" not in str(raised.value)


def test_errors_at_the_door(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    with pytest.raises(UnsupportedModel, match="feature layer 3 does not exist"):
        open_target(folder, (3,))
    with pytest.raises(InvalidRequest, match="dtype='int8'"):
        load_target(folder, config_of(folder), "int8")
    with pytest.raises(InvalidRequest, match="device='cuda'"):
        use_device("cuda")
    if not mx.is_available(mx.gpu):
        with pytest.raises(InvalidRequest, match="sees no GPU"):
            use_device("gpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptModel, match="fetch the model again"):
        open_target(folder)


def test_dtypes(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    for name in ("float32", "bfloat16", "float16"):
        target = load_target(folder, config_of(folder), name, FEATURES)
        assert target.dtype == name and target.cache.layers[0].dtype == target.mlx_dtype
        assert prefill(target, IDS).dtype == target.mlx_dtype
    assert load_target(folder, config_of(folder), "auto").dtype == (
        "bfloat16" if mx.default_device() == mx.gpu else "float32"
    )
    assert pick_dtype("auto", mx.bfloat16, on_gpu=False) == mx.float32
    assert pick_dtype("auto", mx.float32, on_gpu=True) == mx.bfloat16
    assert pick_dtype("auto", mx.float16, on_gpu=True) == mx.float16
    assert pick_dtype("float16", mx.float32, on_gpu=True) == mx.float16


def test_a_cache_that_does_not_fit_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    target = open_target(write_model(tmp_path, "llama"))
    before = logits_of(target, prefill(target, IDS))
    with pytest.raises(OutOfMemory, match="lower max_context or max_batch"):
        target.cache.reserve(10**6, 10**7)
    assert target.cache.rows == 1
    assert worst(before, logits_of(target, prefill(target, IDS))) == 0


def test_an_unfinished_download_is_no_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    settings = json.dumps({**config_of(folder), "num_hidden_layers": 4})
    (folder / "config.json").write_text(settings)
    with pytest.raises(CorruptModel, match="mlx-lm cannot load it"):
        open_target(folder)
