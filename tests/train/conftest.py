"""A tiny target with a word-level tokenizer and a chat template, on disk as any Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.train.target import TrainingTarget
from tests.train.crashes import write_data, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def target(model_folder: Path) -> TrainingTarget:
    return TrainingTarget.load(model_folder, "cpu", torch.float32, (0, 2))


@pytest.fixture
def tiny_drafter() -> Drafter:
    torch.manual_seed(3)
    drafter = Drafter(
        DrafterConfig(
            vocab_size=64,
            hidden_size=32,
            num_target_layers=4,
            feature_layers=(0, 2),
            cell="gru",
            head="tied",
            exit_dim=32,
            num_blocks=1,
            trunk_layers=1,
            trunk_heads=4,
            trunk_kv_heads=2,
            draft_vocabulary=40,
            draft_length=4,
        )
    )
    drafter.token_ids.copy_(torch.randperm(64)[:40])
    return drafter.requires_grad_(True)


@pytest.fixture(scope="session")
def data(target: TrainingTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(target, folder)
    return folder
