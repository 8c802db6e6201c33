"""models: what is refused by name before weights load, and which drafter goes with which model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redrafter import models
from redrafter.errors import CorruptModel, IncompatibleDrafter, InvalidRequest, ModelNotFound, UnsupportedModel
from redrafter.params import MAX_DRAFT_LENGTH
from tests.model_folders import LLAMA, fill, flip_bit

# --- what can be run exactly ---


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
        ({"model_type": "bart"}, "bart is an encoder-decoder"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "jamba"}, "state-space"),
        ({"model_type": "rwkv"}, "recurrent state"),
        ({"model_type": "recurrent_gemma"}, "recurrent"),
        ({"model_type": "qwen3_next"}, "linear attention"),
        ({"model_type": "lfm2"}, "convolution"),
        ({"model_type": "llama4_text"}, "chunks"),
        ({"model_type": "deepseek_v3"}, "multi-latent attention"),
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "gpt2"}, "not rotary"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "text_config, vision_config"),
        ({"model_type": "somebodys_own", "auto_map": {"AutoModel": "x.Y"}}, "somebodys_own.*never run"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq' needs kernels"),
        (LLAMA | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention layers"),
    ],
)
def test_refused_by_name(config, words):
    with pytest.raises(UnsupportedModel, match=words):
        models.check_supported(config, None)


@pytest.mark.parametrize("config", [{}, {"model_type": 3}, LLAMA | {"num_attention_heads": 5, "hidden_size": 32}])
def test_configurations_that_make_no_sense(config):
    with pytest.raises(CorruptModel, match=r"config\.json"):
        models.check_supported(config, None)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen3_moe"]
)
def test_the_proved_families_are_accepted(kind):
    assert models.check_supported({"model_type": kind, "max_position_embeddings": 512}, None) == 512
    assert models.check_supported({"model_type": kind, "max_position_embeddings": 512}, 100) == 100


@pytest.mark.parametrize("asked", [0, -1, 129, True, 1.5])
def test_impossible_contexts(asked):
    with pytest.raises(InvalidRequest, match=r"max_context="):
        models.check_supported(LLAMA, asked)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "gemma2", "sliding_window": 64},
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
    ],
)
def test_a_sliding_window_is_the_limit(config):
    config = {**LLAMA, **config}
    assert models.check_supported(config, None) == 64
    assert models.check_supported(config, 10) == 10
    assert models.check_supported(config, 64) == 64
    with pytest.raises(UnsupportedModel, match=r"max_context=65 exceeds 64.*sliding window"):
        models.check_supported(config, 65)


def test_a_window_that_no_layer_uses_is_no_limit():
    unused = {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}
    assert models.check_supported({**LLAMA, **unused}, None) == 128
    assert models.check_supported({**LLAMA, "model_type": "mistral", "sliding_window": None}, None) == 128


def test_rotary_scaling_that_changes_with_the_length_is_the_limit():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    limit = models.check_supported({**LLAMA, "rope_parameters": scaled}, None)
    assert limit == 128 - MAX_DRAFT_LENGTH
    with pytest.raises(UnsupportedModel, match=r"rotary scaling"):
        models.check_supported({**LLAMA, "rope_parameters": scaled}, limit + 1)


# --- drafters ---

DRAFTER = {"vocab_size": 64, "hidden_size": 32, "num_target_layers": 2}


@pytest.fixture
def drafter(tmp_path) -> Path:
    folder = tmp_path / "drafter"
    folder.mkdir()
    fill(folder)
    (folder / "config.json").write_text(json.dumps(DRAFTER))
    return folder


@pytest.fixture
def target(tmp_path) -> models.ModelFiles:
    return models.ModelFiles(name="tiny", path=tmp_path, config=LLAMA)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("vocab_size", "vocabulary of 99, this model's is 64"),
        ("hidden_size", "hidden width of 99, this model's is 32"),
        ("num_target_layers", "number of layers of 99, this model's is 2"),
    ],
)
def test_a_drafter_of_another_model_names_both_numbers(key, words, drafter, target):
    models.check_pair(DRAFTER, LLAMA, "mine")
    with pytest.raises(IncompatibleDrafter, match=f"'mine'.*{words}"):
        models.check_pair(DRAFTER | {key: 99}, LLAMA, "mine")
    (drafter / "config.json").write_text(json.dumps(DRAFTER | {key: 99}))
    with pytest.raises(IncompatibleDrafter, match=words):
        models.resolve_drafter(str(drafter), target)


def test_apples_layout_is_paired_by_what_it_records():
    apple = {"num_draft_layers": 2, "hidden_size": 32, "exit_dim": 64, "rnn": True}
    models.check_pair(apple, LLAMA, "apple")
    with pytest.raises(IncompatibleDrafter, match=r"hidden width of 16, this model's is 32"):
        models.check_pair(apple | {"hidden_size": 16}, LLAMA, "apple")
    with pytest.raises(CorruptModel, match=r"drafter config\.json has no num_target_layers"):
        models.check_pair({"vocab_size": 64, "hidden_size": 32}, LLAMA, "ours")


def test_drafter_folders(drafter, target):
    assert models.resolve_drafter("none", target) is None
    assert models.resolve_drafter(None, target) is None
    assert models.resolve_drafter("auto", target) is None
    assert models.resolve_drafter(str(drafter), target) == drafter
    with pytest.raises(ModelNotFound, match=r"'/no/where' is not a folder"):
        models.resolve_drafter("/no/where", target)
    models.write_manifest(drafter, {})
    flip_bit(drafter / "model.safetensors", -1)
    with pytest.raises(CorruptModel, match=r"model\.safetensors has SHA-256"):
        models.resolve_drafter(str(drafter), target)
    (drafter / "config.json").write_text("{}")
    (drafter / "manifest.json").unlink()
    with pytest.raises(CorruptModel, match=r"drafter config.json has no vocab_size"):
        models.resolve_drafter(str(drafter), target)


def test_the_shipped_drafter_goes_with_the_default_model_only(drafter, target, monkeypatch, tmp_path):
    shipped = tmp_path / "assets" / models.DEFAULT_MODEL
    shipped.parent.mkdir()
    monkeypatch.setattr(models, "ASSETS", shipped.parent)
    default = models.ModelFiles(name=models.DEFAULT_MODEL, path=tmp_path, config=LLAMA)
    assert models.resolve_drafter(None, default) is None
    drafter.rename(shipped)
    with pytest.raises(CorruptModel, match=r"manifest\.json is missing"):
        models.resolve_drafter(None, default)
    models.write_manifest(shipped, {})
    assert models.resolve_drafter(None, default) == shipped
    assert models.resolve_drafter("auto", default) == shipped
    assert models.resolve_drafter("auto", target) is None
