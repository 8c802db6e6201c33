"""A checkpoint is whole or refused: a thousand damaged ones, killed writers, pruning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from redrafter.errors import CorruptModel
from redrafter.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from tests.train.crashes import damaged_checkpoints, some_checkpoint


def test_what_is_saved_is_loaded_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (3, 5, 9, 11):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000009", "step-00000011"]
    assert (tmp_path / "latest").read_text() == "step-00000011\n"
    found = newest_checkpoint(tmp_path, lambda line: None)
    assert found is not None and found.step == 11 and found.state["progress"]["best"] == 1.25
    assert torch.equal(found.tensors["weights.a"], some_checkpoint(11).tensors["weights.a"])
    assert found.tensors["rng"].dtype == torch.uint8


def test_the_newest_whole_one_is_taken_and_the_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, some_checkpoint(step), keep=3)
    (tmp_path / "step-00000002" / "state.json").unlink()
    (tmp_path / ".tmp-step-00000003").mkdir()
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and "step-00000002" in said[0] and "state.json" in said[0]
    save_checkpoint(tmp_path, some_checkpoint(3), keep=3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_thousand_damaged_checkpoints_are_all_refused(tmp_path: Path) -> None:
    found = damaged_checkpoints(tmp_path, 1000)
    assert found["loaded"] == 0 and found["damaged"] == 1000
    assert min(found["truncated"], found["bit_flipped"], found["zero_filled"]) >= 333


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, some_checkpoint(7), keep=1).rename(tmp_path / "step-00000008")
    with pytest.raises(CorruptModel, match="holds step 7"):
        load_checkpoint(tmp_path / "step-00000008")
