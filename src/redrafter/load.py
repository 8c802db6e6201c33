"""From a name's files to an engine: checks, weights, cache, and the beam shape that pays on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from redrafter.backends.torch.checkpoint import load_drafter, read_metadata
from redrafter.backends.torch.load import TorchBackend, load_target, pick_device, pick_dtype
from redrafter.engine import Engine
from redrafter.models import ModelFiles, check_supported
from redrafter.params import MAX_TREE, PLAIN, DecodeConfig, from_mapping
from redrafter.shape import Candidate, pick_shape


def load(
    files: ModelFiles,
    drafter: Path | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_context: int | None = None,
    max_batch: int = 8,
    config: DecodeConfig | None = None,
    threads: int | None = None,
) -> Engine:
    """An engine over the files of a model and of its drafter. Without ``config`` the beam shape is picked by timing
    the shapes whose tokens per step the drafter's metadata names (``shape.py``)."""
    context_limit = check_supported(files.config, max_context)
    if threads is not None:
        torch.set_num_threads(threads)
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    weights = None if drafter is None else load_drafter(drafter)
    layers = () if weights is None else weights.config.feature_layers
    target = load_target(files.path, number, where, layers)
    backend = TorchBackend(target, weights, context_limit, eos_ids(files.path))
    if where.type != "cpu":
        backend.reserve(max_batch, context_limit + MAX_TREE)
    if config is None and drafter is not None:
        candidates = known_shapes(read_metadata(drafter))
        config = pick_shape(backend, candidates)[0].config if candidates else DecodeConfig()
    return Engine(backend, config or PLAIN, max_batch)


def eos_ids(folder: Path) -> set[int]:
    """Every id that ends an answer, after generation_config.json and config.json."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text()).get("eos_token_id")
            found |= set(value) if isinstance(value, list) else {value} - {None}
    return found


def known_shapes(metadata: dict[str, Any]) -> list[Candidate]:
    """The beam shapes whose tokens per step were measured for this drafter (metadata ``tokens_per_step``: a list of
    DecodeConfig settings, each with its ``tokens_per_step``)."""
    shapes = []
    for entry in metadata.get("tokens_per_step", []):
        settings = {k: v for k, v in entry.items() if k != "tokens_per_step"}
        shapes.append(Candidate(from_mapping(DecodeConfig, settings), float(entry["tokens_per_step"])))
    return shapes
