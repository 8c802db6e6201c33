"""A checkpoint is whole or refused: a thousand damaged ones, killed writers, pruning."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from redrafter.errors import CorruptModel
from redrafter.train.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"weights.a": torch.randn(5, 7, generator=generator), "rng": torch.arange(9, dtype=torch.uint8)}
    return Checkpoint(step, tensors, {"progress": {"step": step, "best": 1.25}})


def test_what_is_saved_is_loaded_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (3, 5, 9, 11):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000009", "step-00000011"]
    assert (tmp_path / "latest").read_text() == "step-00000011\n"
    found = newest_checkpoint(tmp_path, lambda line: None)
    assert found is not None and found.step == 11 and found.state["progress"]["best"] == 1.25
    assert torch.equal(found.tensors["weights.a"], checkpoint(11).tensors["weights.a"])
    assert found.tensors["rng"].dtype == torch.uint8


def test_the_newest_whole_one_is_taken_and_the_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    (tmp_path / "step-00000002" / "state.json").unlink()
    (tmp_path / ".tmp-step-00000003").mkdir()
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and "step-00000002" in said[0] and "state.json" in said[0]
    save_checkpoint(tmp_path, checkpoint(3), keep=3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_thousand_damaged_checkpoints_are_all_refused(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path / "whole", checkpoint(7), keep=1)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert load_checkpoint(whole).step == 7
    rng = random.Random(0)
    damaged = tmp_path / whole.name
    loaded = 0
    for case in range(1000):
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        name = rng.choice(sorted(contents))
        for other, data in contents.items():
            (damaged / other).write_bytes(data)
        data = bytearray(contents[name])
        if case % 3 == 0:
            del data[rng.randrange(len(data)) :]
        elif case % 3 == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            first = rng.randrange(len(data))
            last = min(len(data), first + rng.choice((16, 512, 4096)))
            if not any(data[first:last]):
                first, last = 0, len(data)
            data[first:last] = bytes(last - first)
        assert bytes(data) != contents[name]
        (damaged / name).write_bytes(data)
        try:
            load_checkpoint(damaged)
            loaded += 1
        except CorruptModel:
            pass
    assert loaded == 0


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(7), keep=1).rename(tmp_path / "step-00000008")
    with pytest.raises(CorruptModel, match="holds step 7"):
        load_checkpoint(tmp_path / "step-00000008")
