"""A drafter survives the disk, and whatever else the disk holds is a clear error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redrafter.backends.torch import checkpoint
from redrafter.backends.torch.checkpoint import load_apple, load_drafter, read_metadata, save_apple, save_drafter
from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.errors import CorruptModel, ModelNotFound

V, D = 23, 8
VARIANTS = [
    {},
    {"cell": "sum", "exit_dim": 12, "num_blocks": 1},
    {"cell": "medusa", "head": "tied", "draft_length": 3},
    {"cell": "gru", "feature_layers": (0, 3), "trunk_layers": 1, "trunk_heads": 2, "draft_vocabulary": 7},
    {"cell": "gru", "head": "tied", "width": 4, "feature_layers": (1,), "context_state": True},
]
APPLE = [{}, {"num_blocks": 0}, {"exit_dim": 12, "num_blocks": 1}, {"cell": "sum"}]


def build(variant: dict, dtype: torch.dtype = torch.float32) -> Drafter:
    torch.manual_seed(1)
    drafter = Drafter(DrafterConfig(vocab_size=V, hidden_size=D, num_target_layers=4, **variant)).to(dtype)
    if drafter.config.draft_vocabulary:
        drafter.token_ids.copy_(torch.randperm(V)[: drafter.config.draft_vocabulary])
    return drafter


def assert_same(a: Drafter, b: Drafter) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(a.token_ids, b.token_ids)


def rewrite_manifest(folder: Path) -> None:
    """So that what comes after the manifest's check is reached."""
    entries = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("config.json", "model.safetensors")
    }
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_drafter(build(VARIANTS[3]), tmp_path / "drafter", {"target": "tiny"})
    return tmp_path / "drafter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, dtype, tmp_path):
    drafter = build(variant, dtype)
    save_drafter(drafter, tmp_path, {"target": "tiny", "tokens_per_step": 2.5})
    loaded = load_drafter(tmp_path)
    assert_same(loaded, drafter)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert read_metadata(tmp_path) == {"target": "tiny", "tokens_per_step": 2.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_the_files_say_what_they_are(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == "redrafter"
    assert config["format_version"] == 1
    assert config["feature_layers"] == [0, 3]
    manifest = json.loads((saved / "manifest.json").read_text())["files"]
    assert set(manifest) == {"config.json", "model.safetensors"}
    for name, entry in manifest.items():
        data = (saved / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_saving_again_replaces(saved):
    other = build({})
    save_drafter(other, saved, {})
    assert_same(load_drafter(saved), other)


def test_a_save_that_is_killed_leaves_the_old_drafter(saved, monkeypatch):
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        save_drafter(build({}), saved, {})
    assert_same(load_drafter(saved), build(VARIANTS[3]))
    assert len(list(saved.iterdir())) == 3, "nothing is left aside"


def test_everything_is_flushed_before_the_first_rename(tmp_path, monkeypatch):
    events: list[str] = []
    flush, replace = os.fsync, Path.replace

    def record(path: Path, to: Path) -> Path:
        events.append(f"rename {Path(to).name}")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), flush(fd))[1])
    monkeypatch.setattr(Path, "replace", record)
    save_drafter(build({}), tmp_path, {})
    names = ["rename model.safetensors", "rename config.json", "rename manifest.json"]
    assert events == ["flush", "flush", "flush", *names, "flush"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(CorruptModel, match=f"{name} is missing"):
        load_drafter(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[:-1])
    with pytest.raises(CorruptModel, match=name):
        load_drafter(saved)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_one_flipped_bit(saved, place):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[int(len(data) * place)] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptModel, match=r"model\.safetensors was changed"):
        load_drafter(saved)


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFound, match="nowhere"):
        load_drafter(tmp_path / "nowhere")


def change_config(folder: Path, remove: str | None = None, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop(remove, None)
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 3}, "unknown keys layers"),
        ({"cell": "lstm"}, "cell='lstm' is unknown"),
        ({"hidden_size": "8"}, "hidden_size='8' must be of type int"),
        ({"hidden_size": -8}, "hidden_size=-8"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"context_state": 1}, "context_state=1 must be of type bool"),
        ({"trunk_expansion": "2"}, "trunk_expansion='2'"),
        ({"feature_layers": 3}, "feature_layers=3"),
        ({"feature_layers": ["a"]}, "feature_layers"),
        ({"format": "medusa"}, "format 'medusa' 1 is unknown"),
        ({"format_version": 2}, "format 'redrafter' 2 is unknown"),
        ({"num_blocks": 3}, "missing tensors blocks.2"),
        ({"num_blocks": 1}, "unexpected tensors blocks.1"),
        ({"draft_vocabulary": 6}, r"head.weight has shape \[7, 16\]|token_ids has shape"),
    ],
)
def test_a_config_that_does_not_fit(saved, values, message):
    change_config(saved, **values)
    with pytest.raises(CorruptModel, match=message) as caught:
        load_drafter(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_key(saved):
    change_config(saved, remove="vocab_size")
    with pytest.raises(CorruptModel, match="vocab_size is missing"):
        load_drafter(saved)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\udcff"])
def test_a_config_that_is_not_a_json_object(saved, content):
    (saved / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CorruptModel, match=r"config\.json"):
        load_drafter(saved)


@pytest.mark.parametrize("content", ["{}", '{"files": {"config.json": {}}}', '{"files": []}'])
def test_a_manifest_that_lists_too_little(saved, content):
    (saved / "manifest.json").write_text(content)
    with pytest.raises(CorruptModel, match=r"manifest\.json must list"):
        load_drafter(saved)


def test_a_manifest_that_points_elsewhere(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptModel, match="not an entry of this folder"):
        load_drafter(saved)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.weight"), "missing tensors head.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensors extra"),
        (lambda t: t.update({"head.weight": torch.zeros(7, 15)}), r"head.weight has shape \[7, 15\]"),
        (lambda t: t["head.weight"][2, 3].fill_(float("nan")), "head.weight holds numbers that are not finite"),
        (lambda t: t["head.weight"][2, 3].fill_(float("inf")), "head.weight holds numbers that are not finite"),
        (lambda t: t.update({"head.weight": t["head.weight"].half()}), "weights of type torch.float16, torch.float32"),
        (lambda t: t.update({k: v.double() for k, v in t.items() if k != "token_ids"}), "torch.float64"),
        (lambda t: t["token_ids"].fill_(3), "token_ids must be distinct"),
        (lambda t: t["token_ids"][0].fill_(V), f"vocab_size={V}"),
        (lambda t: t["token_ids"][0].fill_(-1), f"vocab_size={V}"),
    ],
)
def test_weights_that_do_not_fit(saved, change, message):
    change_weights(saved, change)
    with pytest.raises(CorruptModel, match=message) as caught:
        load_drafter(saved)
    assert str(saved / "model.safetensors") in str(caught.value)


def test_not_a_safetensors_file(saved):
    (saved / "model.safetensors").write_bytes(b"\x80\x04pickle")
    rewrite_manifest(saved)
    with pytest.raises(CorruptModel, match=r"model\.safetensors cannot be read"):
        load_drafter(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", APPLE)
def test_apple_round_trip(variant, dtype, tmp_path):
    drafter = build(variant, dtype)
    save_apple(drafter, tmp_path)
    for loaded in (load_apple(tmp_path), load_drafter(tmp_path)):
        assert loaded.config.num_target_layers == 0, "Apple's config does not say"
        for name, tensor in drafter.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.config.cell == drafter.config.cell


def test_apple_names(tmp_path):
    save_apple(build({"exit_dim": 12, "num_blocks": 1}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {
        "input_proj.weight",
        "input_proj.bias",
        "lm_head.0.linear.weight",
        "lm_head.0.linear.bias",
        "lm_head.1.weight",
        "rnn_u.weight",
        "rnn_u.bias",
        "rnn_w.weight",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": V,
        "hidden_size": D,
        "exit_dim": 12,
        "num_draft_layers": 1,
        "rnn": True,
    }


def test_apple_set_b_and_no_manifest(tmp_path):
    """The older names, as other tools leave them."""
    drafter = build({"cell": "sum", "exit_dim": 12})
    save_apple(drafter, tmp_path)
    (tmp_path / "manifest.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {k.replace("lm_head.", "lm_heads.").replace("input_proj.", "input_projs."): v for k, v in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    loaded = load_drafter(tmp_path)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_apple_layout_cannot_hold_the_others(tmp_path):
    for variant in (VARIANTS[2], VARIANTS[3], {"state_size": 4}, {"context_state": True}):
        with pytest.raises(CorruptModel, match="use save_drafter"):
            save_apple(build(variant), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_apple_folder_that_is_wrong(tmp_path):
    save_apple(build({}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_draft_layers": 1}))
    with pytest.raises(CorruptModel, match=r"output matrix lm_head\.1\.weight is missing"):
        load_apple(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "8"}))
    with pytest.raises(CorruptModel, match="hidden_size='8'"):
        load_apple(tmp_path)
    del config["rnn"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptModel, match="lacks rnn"):
        load_apple(tmp_path)


def test_a_changed_apple_file_with_a_manifest(tmp_path):
    save_apple(build({}), tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptModel, match="was changed"):
        load_drafter(tmp_path)
