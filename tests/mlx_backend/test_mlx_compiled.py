"""A step as one compiled function, joined products, query heads side by side: the same numbers as the plain way."""
# ruff: noqa: E402 - nothing below may be imported where MLX is absent

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'redrafter[mlx]'")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'redrafter[mlx]'")

import mlx.nn as nn

from redrafter.algorithm.step import DecodeState
from redrafter.backends.mlx.attention import Attention, GatedMLP, joined
from redrafter.backends.mlx.compiled import flatten, unflatten
from redrafter.backends.mlx.drafter import load_drafter
from redrafter.backends.mlx.kv_cache import GPU_SLOT_STEP, SLOT_STEP
from redrafter.backends.mlx.load import MLXBackend
from redrafter.backends.mlx.target import MLXTarget
from redrafter.engine import Engine
from redrafter.params import PLAIN, DecodeConfig
from tests.mlx_backend.tiny import FAMILIES, FEATURES, open_backend, open_target, write_drafter, write_model
from tests.test_engine import PROMPT, params
from tests.tiny import run, run_all

SHAPE = DecodeConfig(beam_width=3, branching=3, draft_length=3, tree_size=8)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU mx.compile calls g++")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {family: write_model(root / family, family) for family in FAMILIES}
    made["lone heads"] = write_model(root / "lone", "llama", num_key_value_heads=4)
    made["drafter"] = write_drafter(root / "drafter")
    return made


class Pair(NamedTuple):
    a: object
    b: object


def test_nested_arrays_come_apart_and_together() -> None:
    one, two = mx.array([1]), mx.array([2.0])
    value = Pair((one, None, True), Pair(two, ()))
    leaves: list = []
    layout = flatten(value, leaves)
    assert [x.tolist() for x in leaves] == [[1], [2.0]]
    assert hash(layout) == hash(flatten(Pair((two, None, True), Pair(one, ())), []))
    assert layout != flatten(Pair((one, None, False), Pair(two, ())), [])
    back = unflatten(layout, iter(leaves))
    assert type(back) is Pair and type(back.b) is Pair and back.a[1:] == (None, True) and back.b.b == ()
    assert back.a[0] is one and back.b.a is two


@needs_compiler
def test_compiled_plain_steps_give_the_same_ids(folders: dict[str, Path]) -> None:
    backend = open_backend(folders["llama"], None)
    expected, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    backend.steps.compiled = True
    assert run(Engine(backend, PLAIN), PROMPT, params("greedy"))[0] == expected
    assert len(backend.steps) == 1
    backend.reserve(2, 400)
    assert len(backend.steps) == 0


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("setting", ["greedy", "all"])
def test_compiled_speculative_steps_give_the_same_ids(folders: dict[str, Path], setting: str) -> None:
    """Two minutes: g++ is called for every kernel of a tree's arithmetic."""
    backend = open_backend(folders["qwen3"], folders["drafter"])
    plain, _ = run(Engine(backend, PLAIN), PROMPT, params(setting))
    eager, expected = run(Engine(backend, SHAPE), PROMPT, params(setting))
    backend.steps.compiled = True
    for ahead in (False, True):
        backend.run_ahead = ahead
        ids, statistics = run(Engine(backend, SHAPE), PROMPT, params(setting))
        assert ids == eager == plain
        assert statistics.accepted_at_depth[:3] == expected.accepted_at_depth[:3]
    assert 1 <= len(backend.steps) <= 3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_ahead_changes_no_answer(folders: dict[str, Path], family: str) -> None:
    """Requests of different lengths that end at different times. The slots looked at follow from what the host knew."""
    backend = open_backend(folders[family], folders["drafter"])
    prompts = [PROMPT[: 3 + 4 * i] for i in range(3)]
    asked = [params("sampled", max_new_tokens=12 + 9 * i) for i in range(3)]
    alone = [run(Engine(backend, PLAIN), prompt, how)[0] for prompt, how in zip(prompts, asked, strict=True)]
    backend.run_ahead = True
    waited: list[bool] = []
    about = backend._known.about

    def spy(lengths: mx.array) -> bool:
        waited.append(not about(lengths))
        return about(lengths)

    backend._known.about = spy
    for config in (PLAIN, SHAPE):
        together = run_all(Engine(backend, config, max_batch=3), prompts, asked)
        assert [ids for ids, _ in together] == alone
    assert sum(waited) < len(waited) / 2, "most steps must be started without waiting for the one before"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_lone_text_in_order_needs_no_mask(folders: dict[str, Path], family: str, ahead: bool) -> None:
    """Where attention without one has a kernel of its own; a text whose slots were renumbered goes on with a mask."""
    backend = open_backend(folders[family], folders["drafter"])
    expected, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    backend.maskless, backend.run_ahead, masks = True, ahead, []
    attention = backend.target._layers[0][0]
    mask_of = attention.mask
    attention.mask = lambda *given: masks.append(given) or mask_of(*given)
    engine = Engine(backend, PLAIN)
    engine.prefix_reuse = False
    assert run(engine, PROMPT, params("greedy"))[0] == expected
    assert len(masks) <= 1, "but for its prompt"
    engine = Engine(backend, Seldom())
    engine.prefix_reuse = False
    assert run(engine, PROMPT, params("greedy"))[0] == expected
    assert len(masks) > 4


def test_plain_steps_keep_their_shapes_while_the_drafter_does_not_look(folders: dict[str, Path]) -> None:
    """A compiled step is written down anew for every shape."""
    backend = open_backend(folders["llama"], folders["drafter"])
    expected, _ = run(Engine(backend, PLAIN), PROMPT, params("greedy"))
    function, seen = backend.steps._function, set()

    def spy(state: DecodeState, config: DecodeConfig) -> object:
        seen.add((config, *(x.shape for x in state.reading)))
        return function(state, config)

    backend.steps._function = spy
    engine = Engine(backend, Seldom())
    assert run(engine, PROMPT, params("greedy"))[0] == expected
    assert len(seen) == 2, seen


class Seldom:
    """Speculates in every fifth step."""

    shapes = (SHAPE, PLAIN)
    steps = 0

    def choose(self, rows: int) -> DecodeConfig:
        self.steps += 1
        return SHAPE if self.steps % 5 == 0 else PLAIN

    def observe(self, config: DecodeConfig, accepted: list[int], seconds: float | None) -> None:
        """Nothing to learn."""

    def table(self) -> list:
        return []


@pytest.mark.parametrize("name", [*FAMILIES, "lone heads"])
def test_query_heads_side_by_side(folders: dict[str, Path], name: str) -> None:
    model = open_target(folders[name]).model
    answers = []
    for side_by_side in (False, True):
        target = MLXTarget(model, FEATURES, side_by_side)
        backend = MLXBackend(target, load_drafter(folders["drafter"]), 200, [])
        answers += [run(Engine(backend, config), PROMPT, params("greedy"))[0] for config in (PLAIN, SHAPE)]
    assert all(ids == answers[0] for ids in answers) and len(answers[0]) == 40


def test_a_single_query_has_the_rows_that_share_its_keys(folders: dict[str, Path]) -> None:
    visible = mx.array([[[True, False]]])
    for name, rows in (("llama", 2), ("lone heads", 2), ("qwen3", 2)):
        attention = MLXTarget(open_target(folders[name]).model, (), True)._layers[0][0]
        assert attention.mask(visible, mx.float32).shape == (1, 1, rows, 2), name
    plain = MLXTarget(open_target(folders["llama"]).model, (), False)._layers[0][0]
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        shown, hidden = plain.mask(visible, dtype)[0, 0, 0].tolist()
        assert shown == 0 and -mx.inf < hidden < -5e4 and mx.exp(mx.array(hidden, dtype) + 2000).item() == 0


def linears(bits: int | None = None, bias: bool = True) -> list[nn.Module]:
    mx.random.seed(5)
    made: list[nn.Module] = [nn.Linear(64, size, bias=bias) for size in (64, 32, 32)]
    for linear in made if bias else []:
        linear.bias = mx.random.normal(linear.bias.shape)
    return made if bits is None else [linear.to_quantized(32, bits) for linear in made]


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_joined_products_and_their_parts_are_the_linears_own(bits: int | None, bias: bool) -> None:
    x = mx.random.normal((3, 64))
    parts = linears(bits, bias)
    expected = mx.concatenate([linear(x) for linear in parts], axis=-1)
    together = joined(parts)
    assert mx.allclose(together(x), expected, rtol=0, atol=1e-5).item()
    assert mx.allclose(mx.concatenate([linear(x) for linear in parts], axis=-1), expected, rtol=0, atol=1e-5).item()


def test_linears_of_different_kinds_stay_apart() -> None:
    x = mx.random.normal((3, 64))
    parts = [*linears(4)[:1], *linears(8)[1:2], *linears()[2:]]
    expected = mx.concatenate([linear(x) for linear in parts], axis=-1)
    assert mx.array_equal(joined(parts)(x), expected).item()


def test_yarn_rotates_no_values(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its rotation scales what it is given, also at position 0."""
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
    target = open_target(write_model(tmp_path, "llama", rope_parameters=yarn))
    assert type(target.model.model.layers[0].self_attn.rope).__name__ == "YarnRoPE"
    target.cache.reserve(1, 32)
    features = target.prefill(0, mx.array(PROMPT), 0)
    logits = target._logits(features[:, : target.hidden_size])
    assert mx.allclose(logits, target.model(mx.array([PROMPT]))[0], rtol=0, atol=1e-5).item()


def test_many_vectors_are_rotated_in_parts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target = open_target(folders["qwen3"])
    target.cache.reserve(1, 32)
    expected = target.prefill(0, mx.array(PROMPT), 0).tolist()
    monkeypatch.setattr("redrafter.backends.mlx.attention.MAX_ROTATED", 7)
    assert target.prefill(0, mx.array(PROMPT), 0).tolist() == expected


def test_slots_are_looked_at_in_steps_that_suit_the_device(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_target(folders["llama"]).cache
    cache.reserve(1, 1000)
    assert cache.round_up(SLOT_STEP + 1) == 2 * SLOT_STEP and cache.round_up(2000) == 1000
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert cache.round_up(SLOT_STEP + 1) == GPU_SLOT_STEP


def test_mlx_lm_s_own_forward_still_works_on_the_joined_weights(folders: dict[str, Path]) -> None:
    model = open_target(folders["llama"]).model
    before = model(mx.array([PROMPT]))
    Attention(model.model.layers[0].self_attn, False)
    GatedMLP(model.model.layers[0].mlp)
    assert mx.allclose(model(mx.array([PROMPT])), before, rtol=0, atol=1e-6).item()
