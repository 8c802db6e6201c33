"""Tiny models and drafters on disk, opened by both backends. Imported only where MLX is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import torch
from mlx_lm.utils import save_model

from redrafter.backends.mlx.drafter import load_drafter
from redrafter.backends.mlx.load import MLXBackend, load_target
from redrafter.backends.mlx.target import MLXTarget
from redrafter.backends.torch.checkpoint import load_drafter as load_torch_drafter
from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.load import TorchBackend
from redrafter.backends.torch.load import load_target as load_torch_target
from tests.tiny import drafter_config, make_model

FEATURES = (0, 2)
CONTEXT = 200
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_model(folder: Path, family: str, **overrides: object) -> Path:
    """A random model in the layout of transformers. Its rotary base is no default: a reader that ignores it fails."""
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "intermediate_size": 64, **overrides}
    model = make_model(family, **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():  # norms and biases that start as 1 and 0 would hide being left out
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    model.save_pretrained(folder)
    return folder


def write_drafter(folder: Path, **overrides: object) -> Path:
    torch.manual_seed(7)
    save_drafter(Drafter(drafter_config(**overrides)), folder, {})
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def open_target(folder: Path, features: Sequence[int] = FEATURES) -> MLXTarget:
    return load_target(folder, config_of(folder), "float32", features)


def open_backend(model: Path, drafter: Path | None, context: int = CONTEXT) -> MLXBackend:
    return MLXBackend(open_target(model), None if drafter is None else load_drafter(drafter), context, [])


def open_torch(model: Path, drafter: Path | None) -> TorchBackend:
    target = load_torch_target(model, torch.float32, torch.device("cpu"), FEATURES)
    return TorchBackend(target, None if drafter is None else load_torch_drafter(drafter), CONTEXT, [])


def write_quantised(folder: Path, source: Path, bits: int = 4) -> Path:
    """What mlx-lm's convert writes: packed weights, and ``quantization`` in config.json, twice under its two names."""
    target = open_target(source)
    nn.quantize(target.model, group_size=32, bits=bits)
    save_model(folder, target.model)
    how = {"group_size": 32, "bits": bits}
    settings = {**config_of(source), "quantization": how, "quantization_config": how}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def array(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.numpy())
