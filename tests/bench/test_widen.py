"""The instrument computes the small model's function: logits, draft logits, and every step of the engine."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from redrafter.backends.torch.attention import EXACT
from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.bench.widen import SHAPES, Heads, place_heads, shape_named, wide_config, widen, widen_model
from redrafter.bench.widen_drafter import wide_drafter_config, widen_drafter
from redrafter.engine import Engine
from redrafter.errors import InvalidRequest
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from tests.tiny import make_model, run

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
# Query heads beside taken ones (4/2: three small heads of one group take two wide groups), and 1 small group of 1.
GROUPED = {**WIDE, "num_key_value_heads": 2}
SPARE = {**WIDE, "num_key_value_heads": 1}
PROMPT = [5, 17, 33, 8, 90, 41, 41, 12, 60, 3, 77, 24, 9]


def small_model(tie: bool, attention: str = "eager") -> Any:
    model = make_model("llama", attention, tie_word_embeddings=tie, **SMALL)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.uniform_(0.5, 2.0, generator=generator)
    return model


def small_drafter(**changes: Any) -> Drafter:
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "num_target_layers": 2,
        "feature_layers": (0, 1),
        "cell": "gru",
        "head": "tied",
        "context_state": True,
        "exit_dim": 48,
        "num_blocks": 1,
        "trunk_layers": 2,
        "trunk_heads": 3,
        "trunk_kv_heads": 1,
        "draft_vocabulary": 40,
    }
    torch.manual_seed(5)
    drafter = Drafter(DrafterConfig(**{**values, **changes})).eval().requires_grad_(False)
    if drafter.config.draft_vocabulary:
        drafter.token_ids.copy_(torch.randperm(96)[:40])
    return drafter


def wide_target(model: Any, sizes: dict[str, Any] = WIDE, tie: bool | None = None, attention: str = "eager") -> Any:
    return widen_model(model, wide_config(model.config, tie, **sizes), torch.float32, "cpu", 1, attention)


@pytest.mark.parametrize("sizes", [WIDE, GROUPED, SPARE], ids=["4/4", "4/2", "4/1"])
@pytest.mark.parametrize(("tied", "tie"), [(True, None), (False, None), (True, False)])
def test_logits_agree(tied: bool, tie: bool | None, sizes: dict[str, Any]) -> None:
    small = small_model(tied)
    wide = wide_target(small, sizes, tie)
    ids = torch.tensor([PROMPT])
    a, b = (m(ids, output_hidden_states=True) for m in (small, wide))
    assert a.logits.abs().max() > 1 and torch.equal(a.logits.argmax(-1), b.logits.argmax(-1))
    assert (a.logits - b.logits).abs().max() < 1e-4
    for x, y in zip(a.hidden_states[:-1], b.hidden_states, strict=False):
        assert (y[..., :48] - x).abs().max() < 1e-4 and not y[..., 48:].any()


def test_the_state_dict_loads_and_another_seed_changes_only_the_filling() -> None:
    small = small_model(True)
    config = wide_config(small.config, **WIDE)
    states = [widen(small.config, small.state_dict(), config, torch.Generator().manual_seed(s)) for s in (1, 2)]
    logits = []
    for state in states:
        wide = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        wide.load_state_dict(state)
        logits.append(wide(torch.tensor([PROMPT])).logits)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(states[0][name], states[1][name])
    assert torch.equal(states[0][name][:64, :48], states[1][name][:64, :48])
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_zero_weights_are_few() -> None:
    """Zero are: rows of dead channels at columns of live ones. 48 of 128 hidden channels are live."""
    state = wide_target(small_model(False)).state_dict()
    read, dead = 48 / 128, 80 / 128
    expected = {"q": 48 / 128 * read, "k": 0, "v": dead * read, "o": dead * 48 / 128}
    expected |= {"gate": 0, "up": 96 / 160 * read, "down": dead * 64 / 160}
    for layer in range(3):
        if layer == 2:  # the extra one: dead values and a dead up, nothing else
            expected = {**dict.fromkeys(expected, 0), "v": read, "up": read}
        for name, share in expected.items():
            part = "self_attn" if name in "qkvo" else "mlp"
            weight = state[f"model.layers.{layer}.{part}.{name}_proj.weight"]
            assert float((weight == 0).float().mean()) == pytest.approx(share), (layer, name)
    assert (state["lm_head.weight"] != 0).all()


def draft_logits(model: Any, drafter: Drafter) -> list[Tensor]:
    """Context over the prompt, then three tokens read: the draft's logits after each."""
    layers: list[Tensor] = []
    hooks = [
        model.model.layers[i].register_forward_hook(lambda _module, _args, y: layers.append(y))
        for i in drafter.config.feature_layers
    ]
    last = model.model(torch.tensor([PROMPT])).last_hidden_state
    for hook in hooks:
        hook.remove()
    embed = model.get_input_embeddings()
    positions = torch.arange(len(PROMPT))[None]
    context = drafter.context(torch.cat([last, *layers], -1), embed(torch.tensor([[*PROMPT[1:], 7]])), positions)
    context = context[:, -1]
    state, logits = drafter.first_state(context, embed(torch.tensor([7]))), []
    for depth, token in enumerate((3, 50, 81)):
        hidden = drafter.exit_hidden(context, state)
        head = drafter.head if drafter.config.head == "own" else model.lm_head
        logits.append(head(hidden))
        state = drafter.next_state(state, embed(torch.tensor([token])), depth + 1)
    return logits


NARROW = {"width": 24, "trunk_kv_heads": 3, "exit_dim": 20}
APPLE = {"feature_layers": (), "trunk_layers": 0, "trunk_heads": 0, "context_state": False, "draft_vocabulary": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exit_dim": 0, "num_blocks": 2},
        {"cell": "rnn", "head": "own", "draft_vocabulary": 0},
        {"context_state": False, "state_size": 24},
        {"trunk_heads": 0, "trunk_kv_heads": 0},
        {"cell": "sum"},
        {**APPLE, "cell": "rnn", "head": "own", "exit_dim": 0, "num_blocks": 2, "trunk_kv_heads": 0},
        {**APPLE, "cell": "sum", "head": "own", "exit_dim": 0, "trunk_kv_heads": 0},
    ],
    ids=["shipped", "no projection", "rnn, own head", "narrow state", "no attention", "sum", "Apple rnn", "Apple sum"],
)
@pytest.mark.parametrize("tie", [None, False], ids=["tied", "head of its own"])
def test_draft_logits_agree(changes: dict[str, Any], tie: bool | None) -> None:
    small, drafter = small_model(True), small_drafter(**changes)
    wide = wide_target(small, WIDE, tie)
    with torch.no_grad():
        for linear in (m for m in drafter.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.mul_(2)  # so that states and contexts matter
        a = draft_logits(small, drafter)
        b = draft_logits(wide, widen_drafter(drafter, wide.config, torch.float32, "cpu", 2))
    assert not torch.allclose(a[0], a[1], atol=1e-2)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() < 1e-4 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 96),
        ({}, 48),
        ({"context_state": False, "state_size": 24, "exit_dim": 40, "num_blocks": 2}, 144),
        ({"cell": "rnn", "head": "own", "draft_vocabulary": 0, "exit_dim": 0}, 96),
        (NARROW, 48),
        (NARROW, 0),
    ],
    ids=["shipped", "no wider", "narrow state", "rnn, own head", "narrow", "narrow in proportion"],
)
def test_draft_logits_agree_at_a_width_of_its_own(changes: dict[str, Any], width: int) -> None:
    small, drafter = small_model(True), small_drafter(**changes)
    wide = wide_target(small, WIDE, False)
    with torch.no_grad():
        for linear in (m for m in drafter.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.mul_(2)
        a = draft_logits(small, drafter)
        result = widen_drafter(drafter, wide.config, torch.float32, "cpu", 2, width)
        b = draft_logits(wide, result)
    assert result.config.hidden_size == 128 and result.config.width == (width or 64) and result.config.projected
    assert not torch.allclose(a[0], a[1], atol=1e-2)
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() < 2e-4 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("width", [0, 96], ids=["as its target", "96"])
def test_the_engine_takes_the_same_steps(width: int) -> None:
    small, drafter = small_model(True, EXACT), small_drafter()
    wide = wide_target(small, WIDE, False, EXACT)
    pairs = [
        (small, copy.deepcopy(drafter)),
        (wide, widen_drafter(drafter, wide.config, torch.float32, "cpu", 2, width)),
    ]
    shape = DecodeConfig(beam_width=4, branching=4, draft_length=4, tree_size=16)
    params = SamplingParams(max_new_tokens=48)
    seen = []
    for model, its_drafter in pairs:
        target = make_target(model, its_drafter.config.feature_layers)
        backend = TorchBackend(target, its_drafter, 128, eos_ids=[])
        plain, _ = run(Engine(backend, PLAIN), PROMPT, params)
        ids, stats = run(Engine(backend, shape), PROMPT, params)
        assert ids == plain
        seen.append((ids, stats.steps, stats.accepted_at_depth, stats.tree_nodes))
    assert seen[0] == seen[1]
    assert sum(seen[0][2]) > 0, "nothing was accepted: equal statistics would say little"


def test_bfloat16_stays_within_rounding() -> None:
    small = small_model(False)
    wide = widen_model(small, wide_config(small.config, **WIDE), torch.bfloat16, "cpu", 1)
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}
    a, b = small(torch.tensor([PROMPT])).logits, wide(torch.tensor([PROMPT])).logits.float()
    assert (a - b).norm() / a.norm() < 0.05


def smollm2() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize(("name", "parameters"), [("llama-2-7b", 6.68e9), ("qwen2.5-1.5b", 1.49e9)])
def test_named_shapes_hold_the_small_model_and_its_drafter(name: str, parameters: float) -> None:
    config = shape_named(name, smollm2())
    assert config.tie_word_embeddings and not shape_named(name, smollm2(), tie=False).tie_word_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    drafter = DrafterConfig(
        vocab_size=49152, hidden_size=576, num_target_layers=30, trunk_layers=1, trunk_heads=9, trunk_kv_heads=3
    )
    assert wide_drafter_config(drafter, config).width == SHAPES[name]["hidden_size"]
    if name == "llama-2-7b":
        narrow = wide_drafter_config(drafter, config, 1152)
        assert (narrow.width, narrow.state_size, narrow.trunk_heads, narrow.trunk_kv_heads) == (1152, 1152, 18, 6)


def test_rotary_frequencies_agree() -> None:
    axes = place_heads(Heads(9, 3, 64), Heads(32, 32, 128))
    (part,) = axes.query.parts
    for small, wide in zip((part.small % 64).tolist(), (part.wide % 128).tolist(), strict=True):
        assert small % 32 / 64 == wide % 64 / 128 and small // 32 == wide // 64
    assert part.scale == math.sqrt(2) and len(set(part.wide.tolist())) == 576


def test_what_cannot_be_widened_is_refused() -> None:
    small = small_model(False).config
    for changes, words in (
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "3/1 heads need 3 key/value heads"),
        ({"head_dim": 24}, "share no rotary frequencies"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1 is less"),
        ({"tie": True}, "a tied wide model cannot hold"),
    ):
        config = wide_config(small, **{**WIDE, **changes})
        with pytest.raises(InvalidRequest, match=words):
            widen(small, {}, config, torch.Generator())
    good = wide_config(small, **WIDE)
    packed = {"model.embed_tokens.weight": torch.zeros(96, 48)}
    with pytest.raises(InvalidRequest, match=r"no weight model\.layers\.0\.self_attn\.q_proj"):
        widen(small, packed, good, torch.Generator())
    for name, value in (("vocab_size", 97), ("rms_norm_eps", 1e-5)):
        wrong = wide_config(small, **WIDE)
        setattr(wrong, name, value)
        with pytest.raises(InvalidRequest, match=name):
            widen(small, {}, wrong, torch.Generator())
    with pytest.raises(InvalidRequest, match="'nope' is unknown: use llama-2-7b"):
        shape_named("nope", small)
    for changes, width, words in (
        ({"cell": "medusa"}, 0, "medusa"),
        ({"exit_dim": 50}, 0, "exit_dim=20"),
        ({}, 72, "width=72 is too small for a drafter of 48: use 48 or at least 96"),
        ({}, 112, "width=112 must hold groups of 3 heads of 16"),
        ({"cell": "sum"}, 96, "cell='sum' is as wide as its target"),
        (NARROW, 128, "leave out the drafter's projection"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            wide_drafter_config(small_drafter(**changes).config, good, width, 20)
    with pytest.raises(InvalidRequest, match="use 48 or at least 96"):
        wide_drafter_config(small_drafter().config, wide_config(small, **{**WIDE, "hidden_size": 64}))
