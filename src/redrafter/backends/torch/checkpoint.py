"""A drafter on disk: config.json, model.safetensors and a manifest with the SHA-256 of both; Apple's layout as well.

Everything that can be wrong with the files is a CorruptModel that names the file. No pickle is ever read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from redrafter.backends.torch.drafter import Drafter
from redrafter.drafter_config import DrafterConfig
from redrafter.drafter_files import (
    AGAIN,
    APPLE_KEYS,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    from_apple,
    is_apple,
    own_config,
    read_config,
    verify,
)
from redrafter.errors import CorruptModel
from redrafter.files import flush, sha256

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_drafter(drafter: Drafter, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the drafter in its own dtype. ``metadata`` is any JSON: what it was trained on, its figures."""
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, "metadata": metadata, **drafter.config.to_dict()}
    _write(Path(folder), config, drafter.state_dict())


def load_drafter(folder: Path) -> Drafter:
    """The drafter in ``folder``, on the CPU, in the dtype it was saved in. Apple's layout is recognised by its keys."""
    folder = Path(folder)
    values = read_config(folder)
    if is_apple(values):
        return load_apple(folder)
    return _build(own_config(folder, values), _read_weights(folder), folder)


def read_metadata(folder: Path) -> dict[str, Any]:
    """What ``save_drafter`` was given; empty for Apple's layout."""
    return dict(read_config(Path(folder)).get("metadata") or {})


def update_metadata(folder: Path, changes: dict[str, Any]) -> None:
    """Change what ``read_metadata`` returns; the drafter stays as it is."""
    drafter = load_drafter(folder)
    save_drafter(drafter, folder, read_metadata(folder) | changes)


def save_apple(drafter: Drafter, folder: Path) -> None:
    """Write Apple's layout, tensor set A (notes on the checkpoint contract: ``lm_head.{i}.linear``, ``rnn_u``, ..)."""
    config = drafter.config
    plain = config.cell in ("rnn", "sum") and config.head == "own" and not config.fused and not config.draft_vocabulary
    if not plain or config.context_state or config.state_size != config.hidden_size or config.projected:
        raise CorruptModel(
            f"{folder}: Apple's layout holds cell rnn or sum, an own head over the whole vocabulary and the last "
            f"hidden state only, not cell={config.cell!r}, head={config.head!r}; use save_drafter"
        )
    values = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_blocks,
        "rnn": config.cell == "rnn",
    }
    names = _apple_names(config.num_blocks)
    _write(Path(folder), values, {names(name): tensor for name, tensor in drafter.state_dict().items()})


def load_apple(folder: Path) -> Drafter:
    """Read Apple's layout, tensor set A or B (``lm_heads``, ``input_projs``); a manifest is checked if there is one."""
    folder = Path(folder)
    values = read_config(folder)
    if not is_apple(values):
        missing = ", ".join(k for k in APPLE_KEYS if k not in values)
        raise CorruptModel(f"{folder / CONFIG} lacks {missing}, which Apple's layout has; use load_drafter")
    if (folder / MANIFEST).is_file():
        verify(folder)
    config, stored = from_apple(folder, values, _read_weights(folder))
    return _build(config, stored, folder)


def _apple_names(num_blocks: int) -> Callable[[str], str]:
    """Our tensor name -> Apple's."""

    def name(ours: str) -> str:
        if ours == "head.weight":
            return f"lm_head.{num_blocks}.weight"
        return ours.replace("blocks.", "lm_head.", 1) if ours.startswith("blocks.") else ours

    return name


def _skeleton(config: DrafterConfig) -> Drafter:
    """The modules without memory, to know names and shapes."""
    with torch.device("meta"):
        return Drafter(config)


def _build(config: DrafterConfig, stored: dict[str, Tensor], folder: Path) -> Drafter:
    drafter = _skeleton(config)
    expected = drafter.state_dict()
    path = folder / WEIGHTS
    for problem, names in (("missing", set(expected) - set(stored)), ("unexpected", set(stored) - set(expected))):
        if names:
            raise CorruptModel(f"{path}: {problem} tensors {', '.join(sorted(names))} for its {CONFIG}; {AGAIN}")
    dtypes = {stored[name].dtype for name in stored if name != "token_ids"}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        found = ", ".join(sorted(map(str, dtypes)))
        raise CorruptModel(f"{path}: weights of type {found}; all must be one of float32, bfloat16, float16; {AGAIN}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            want, got = list(expected[name].shape), list(tensor.shape)
            raise CorruptModel(f"{path}: {name} has shape {got}, its {CONFIG} asks for {want}; {AGAIN}")
        if name != "token_ids" and not bool(torch.isfinite(tensor).all()):
            raise CorruptModel(f"{path}: {name} holds numbers that are not finite; {AGAIN}")
    if config.draft_vocabulary:
        _check_token_ids(stored["token_ids"], config, path)
    drafter.load_state_dict(stored, assign=True)
    if not config.draft_vocabulary:
        drafter.token_ids = torch.arange(config.vocabulary)
    return drafter


def _check_token_ids(ids: Tensor, config: DrafterConfig, path: Path) -> None:
    """Two equal ids would put two equal siblings in the tree, which acceptance relies on not to happen."""
    ok = ids.dtype == torch.int64 and ids.unique().numel() == ids.numel()
    if not ok or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise CorruptModel(f"{path}: token_ids must be distinct int64 below vocab_size={config.vocab_size}; {AGAIN}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CorruptModel(f"{path} is missing; {AGAIN}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptModel(f"{path} cannot be read ({error}); {AGAIN}") from error


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """All files are complete on disk under other names before the first gets its own; the manifest comes last, so a
    folder that was written half-way does not pass its check."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG, MANIFEST)}
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside[WEIGHTS])
        aside[CONFIG].write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        entries = {n: {"bytes": aside[n].stat().st_size, "sha256": sha256(aside[n])} for n in (CONFIG, WEIGHTS)}
        aside[MANIFEST].write_text(json.dumps({"files": entries}, indent=2) + "\n")
        for path in aside.values():
            flush(path)
        for name, path in aside.items():
            path.replace(folder / name)
        flush(folder)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
