"""Files that appear whole or not at all: written aside, flushed, renamed, and the folder flushed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redrafter.files import flush, sha256
from redrafter.models import ModelFiles

ASIDE = ".tmp-"
"""Prefix of what is being written; whoever finds one at the start of a run may remove it."""


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a file beside ``path``, which then gets its name. The folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(ASIDE + path.name)
    write(aside)
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """NaN and infinity are refused: no reader of JSON has to know them."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    publish(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path) -> None:
    for path in folder.glob(ASIDE + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def weights_sha256(model: ModelFiles) -> str:
    """One SHA-256 for all weight files of a model: that of their names and hashes in order."""
    lines = [f"{path.name} {sha256(path)}" for path in sorted(model.path.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
