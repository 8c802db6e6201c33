"""Checkpoints that are whole or not there, and that are never believed without proof.

    RUN/checkpoints/step-00000500/   tensors.safetensors   weights, their average, the optimiser's moments, RNG state
                                     state.json            everything else
                                     manifest.json         bytes and SHA-256 of both, written last
    RUN/checkpoints/latest           the newest one's name, for people and scripts; resuming does not rely on it

A checkpoint is written under another name, flushed, and renamed. No pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from redrafter.errors import CorruptModel
from redrafter.models.integrity import MANIFEST, read_json, verify_manifest, write_manifest
from redrafter.train.files import ASIDE, flush, publish, remove_leftovers

TENSORS, STATE, LATEST = "tensors.safetensors", "state.json", "latest"


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Into ``folder``/step-N; all but the ``keep`` newest are removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    final = folder / f"step-{checkpoint.step:08d}"
    aside = folder / (ASIDE + final.name)
    aside.mkdir()
    save_file({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}, aside / TENSORS)
    state = {"step": checkpoint.step, **checkpoint.state}
    (aside / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    flush(aside / TENSORS)
    flush(aside / STATE)
    write_manifest(aside, {})
    if final.exists():
        _discard(final)
    aside.rename(final)
    flush(folder)
    publish(folder / LATEST, lambda path: path.write_text(final.name + "\n"))
    for old in _newest_first(folder)[max(1, keep) :]:
        _discard(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises CorruptModel naming the file unless both files are what the manifest says."""
    manifest = read_json(path / MANIFEST)
    # Nothing vouches for the manifest itself, so it must be, byte for byte, what is written for its contents.
    if (path / MANIFEST).read_text(encoding="utf-8") != json.dumps(manifest, indent=2, sort_keys=True) + "\n":
        raise CorruptModel(f"{path / MANIFEST} is not as it was written: the checkpoint is damaged")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or set(listed) != {TENSORS, STATE}:
        raise CorruptModel(f"{path / MANIFEST} must list {TENSORS} and {STATE}: the checkpoint is damaged")
    verify_manifest(path)
    state = read_json(path / STATE)
    if f"step-{state.get('step', -1):08d}" != path.name:
        raise CorruptModel(f"{path} holds step {state.get('step')}: the folder was renamed; name it as it was")
    return Checkpoint(int(state["step"]), load_file(path / TENSORS), state)


def newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest one that is whole; ``tell`` hears of every damaged one that is skipped."""
    for path in _newest_first(folder):
        try:
            return load_checkpoint(path)
        except CorruptModel as error:
            tell(f"skipping the checkpoint {path.name}: {error}")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def _discard(path: Path) -> None:
    """Rename first: a removal that is interrupted leaves no half checkpoint behind."""
    aside = path.with_name(ASIDE + "old-" + path.name)
    path.rename(aside)
    shutil.rmtree(aside)


def names_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
