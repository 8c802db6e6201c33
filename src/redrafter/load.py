"""From a name's files to an engine: checks, weights, cache, and the beam shape that pays on this machine."""

from __future__ import annotations

import gc
import json
import platform
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redrafter.drafter_files import read_config
from redrafter.engine import Backend, Engine
from redrafter.errors import InvalidRequest
from redrafter.models import ModelFiles, check_supported
from redrafter.params import MAX_TREE, PLAIN, DecodeConfig, from_mapping
from redrafter.policy import Candidate
from redrafter.shape import adaptive

BACKENDS = ("auto", "torch", "mlx")

UNMEASURED = [
    Candidate(DecodeConfig(beam_width=2, branching=2, draft_length=1, tree_size=2), 1.6),
    Candidate(DecodeConfig(beam_width=2, branching=2, draft_length=2, tree_size=4), 1.9),
    Candidate(DecodeConfig(beam_width=4, branching=4, draft_length=3, tree_size=8), 2.2),
    Candidate(DecodeConfig(beam_width=4, branching=4, draft_length=5, tree_size=16), 2.5),
    Candidate(DecodeConfig(beam_width=4, branching=4, draft_length=8, tree_size=32), 2.7),
    Candidate(DecodeConfig(), 2.8),
]
"""Shapes of a drafter that says nothing about itself, with a first guess of its tokens per step."""


def load(
    files: ModelFiles,
    drafter: Path | None,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    max_context: int | None = None,
    max_batch: int = 8,
    config: DecodeConfig | None = None,
    threads: int | None = None,
    compile: bool = True,
    prompt_lookup: int = DecodeConfig.prompt_lookup,
) -> Engine:
    """An engine over the files of a model and of its drafter. Without ``config`` every step takes the shape that
    promises most: the shapes whose tokens per step the drafter's metadata names are timed here (``shape.adaptive``),
    then their times and their acceptance are learnt (``policy.Adaptive``). ``compile=False`` keeps a GPU to eager
    operations: no graphs, no compiled steps, no kernels of ours. ``prompt_lookup``: of the shapes picked here."""
    chosen = pick_backend(backend)
    if chosen == "mlx":  # it does not keep the texts
        prompt_lookup, config = 0, config and replace(config, prompt_lookup=0)
    if threads is not None:
        _set_threads(chosen, threads)
    if chosen == "mlx":
        opened = _open_mlx(files, drafter, dtype, device, max_context, compile)
    else:
        opened = _open_torch(files, drafter, dtype, device, max_context, max_batch, compile)
    candidates: list[Candidate] = []
    if config is None and drafter is not None:
        known = known_shapes(read_config(drafter).get("metadata") or {}) or UNMEASURED
        candidates = [c._replace(config=replace(c.config, prompt_lookup=prompt_lookup)) for c in known]
    opened.prepare(max_batch, [c.config for c in candidates] or [config or PLAIN])
    if not candidates:
        return Engine(opened, config or PLAIN, max_batch)
    return Engine(opened, adaptive(opened, candidates, max_batch), max_batch)


def pick_backend(name: str) -> str:
    """auto: mlx on a Mac with Apple silicon if it is installed, torch elsewhere."""
    if name not in BACKENDS:
        raise InvalidRequest(f"backend={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    # ``mlx`` alone may be an empty namespace: what is imported is asked for.
    missing = [package for package in ("mlx", "mlx_lm") if not find_spec(package)]
    if not missing and not find_spec("mlx.core"):
        missing = ["mlx"]
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        return "mlx" if apple and not missing else "torch"
    if name == "mlx" and missing:
        raise InvalidRequest(f"backend='mlx': {', '.join(missing)} cannot be imported; pip install 'redrafter[mlx]'")
    return name


def _set_threads(backend: str, threads: int) -> None:
    if backend == "mlx":
        raise InvalidRequest(f"threads={threads}: MLX chooses its threads itself; leave it out with --backend mlx")
    import torch

    torch.set_num_threads(threads)


def _open_torch(
    files: ModelFiles,
    drafter: Path | None,
    dtype: str,
    device: str,
    max_context: int | None,
    max_batch: int,
    compile: bool,
) -> Backend:
    from redrafter.backends.torch.checkpoint import load_drafter
    from redrafter.backends.torch.gpu import kernels_trouble
    from redrafter.backends.torch.load import TorchBackend, load_target, pick_device, pick_dtype

    context_limit = check_supported(files.config, max_context)
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    weights = None if drafter is None else load_drafter(drafter)
    layers = () if weights is None else weights.config.feature_layers
    eos = eos_ids(files.path)
    if where.type == "cpu" or not compile:
        plain = TorchBackend(load_target(files.path, number, where, layers), weights, context_limit, eos)
        if where.type != "cpu":
            plain.reserve(max_batch, context_limit + MAX_TREE)
        return plain
    if trouble := kernels_trouble():
        raise InvalidRequest(f"device={device!r}: {trouble}")
    from redrafter.backends.torch.attention import KERNEL
    from redrafter.backends.torch.cuda import GraphBackend

    return GraphBackend(load_target(files.path, number, where, layers, KERNEL), weights, context_limit, eos)


def _open_mlx(
    files: ModelFiles, drafter: Path | None, dtype: str, device: str, max_context: int | None, compile: bool
) -> Backend:
    from redrafter.backends.mlx.drafter import load_drafter
    from redrafter.backends.mlx.load import MLXBackend, load_target, use_device, without_quantisation

    context_limit = check_supported(without_quantisation(files.config), max_context)
    use_device(device)
    weights = None if drafter is None else load_drafter(drafter)
    layers = () if weights is None else weights[0].config.feature_layers
    target = load_target(files.path, files.config, dtype, layers)
    return MLXBackend(target, weights, context_limit, eos_ids(files.path), compiled=None if compile else False)


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


def settle_memory() -> None:
    """What was loaded stays: the garbage collector need not look at it again. Looking at the 370,000 objects of torch
    and a model stops every request for 0.2 s, some day. For a program that keeps its model, not for a library."""
    gc.collect()
    gc.freeze()
