"""The instrument behind an LLM: a small model and its drafter at the cost of a large shape (``widen.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from redrafter.backends.torch.attention import EXACT, FAST, KERNEL
from redrafter.backends.torch.checkpoint import load_drafter
from redrafter.backends.torch.gpu import kernels_trouble, room_for
from redrafter.backends.torch.load import TorchBackend, make_target
from redrafter.bench.widen import shape_named, widen_model
from redrafter.bench.widen_drafter import widen_drafter
from redrafter.drafter_files import read_config
from redrafter.engine import Engine
from redrafter.errors import InvalidRequest
from redrafter.llm import LLM
from redrafter.load import eos_ids, known_shapes
from redrafter.models import ModelFiles
from redrafter.params import MAX_TREE, DecodeConfig
from redrafter.shape import adaptive
from redrafter.text import Tokenizer

WIDTH = 1152
"""Of the widened drafter, whatever the target's: what one would train for a model of several billion weights."""


def open_instrument(
    shape: Any,
    files: ModelFiles,
    drafter: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    max_context: int,
    max_batch: int,
    config: DecodeConfig | None,
    prompt_lookup: int = DecodeConfig.prompt_lookup,
) -> LLM:
    """``shape``: a name of ``widen.SHAPES`` or a LlamaConfig. The rest is as in ``LLM.from_pretrained``."""
    from transformers import AutoModelForCausalLM

    if device.type == "cuda" and compile and (trouble := kernels_trouble()):
        raise InvalidRequest(f"device={str(device)!r}: {trouble}")
    small: Any = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32, local_files_only=True)
    small = small.to(device)
    wide = shape_named(shape, small.config, tie=False) if isinstance(shape, str) else shape
    cpu = device.type == "cpu"
    attention = EXACT if cpu else KERNEL if compile else FAST
    weights = load_drafter(drafter)
    large = widen_drafter(weights, wide, dtype, device, 0, width=min(WIDTH, wide.hidden_size))
    with room_for(f"the model in the shape of {shape}"):
        model = widen_model(small, wide, dtype, device, 0, attention=attention)
    layers: Sequence[int] = large.config.feature_layers
    eos = eos_ids(files.path)
    del small
    if cpu or not compile:
        backend = TorchBackend(make_target(model, layers), large, max_context, eos)
        backend.reserve(max_batch, max_context + 2 * MAX_TREE)
    else:
        from redrafter.backends.torch.cuda import GraphBackend

        backend = GraphBackend(make_target(model, layers), large, max_context, eos)
    known = [] if config else known_shapes(read_config(drafter).get("metadata") or {})
    candidates = [c._replace(config=replace(c.config, prompt_lookup=prompt_lookup)) for c in known]
    backend.prepare(max_batch, [config] if config else [c.config for c in candidates])
    if config is None:
        engine = Engine(backend, adaptive(backend, candidates, max_batch), max_batch)
    else:
        engine = Engine(backend, config, max_batch)
    return LLM(engine, Tokenizer.load(files.path), model=f"{files.name} widened to {shape}", drafter=drafter.name)
