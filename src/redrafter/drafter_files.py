"""The files of a drafter's folder, checked before any weights load: config.json and the manifest. Names no framework.

Everything that can be wrong with them is a CorruptModel that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redrafter.drafter_config import DrafterConfig
from redrafter.errors import CorruptModel, ModelNotFound
from redrafter.files import sha256

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
FORMAT, FORMAT_VERSION = "redrafter", 1
APPLE_KEYS = ("num_draft_layers", "hidden_size", "exit_dim", "rnn")
AGAIN = "fetch or save the drafter again"


def is_apple(values: dict[str, Any]) -> bool:
    return "format" not in values and all(key in values for key in APPLE_KEYS)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelNotFound(
            f"{folder} is not a folder: a drafter is a folder with {CONFIG} and {WEIGHTS}; check the path"
        )
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CorruptModel(f"{path} is missing; {AGAIN}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptModel(f"{path} is not JSON ({error}); {AGAIN}") from error
    if not isinstance(values, dict):
        raise CorruptModel(f"{path} must hold a JSON object, not {type(values).__name__}; {AGAIN}")
    return values


def verify(folder: Path) -> None:
    """Sizes and SHA-256 of every file that the manifest lists."""
    listed = _read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not {CONFIG, WEIGHTS} <= set(listed):
        raise CorruptModel(f"{folder / MANIFEST} must list {CONFIG} and {WEIGHTS}; {AGAIN}")
    for name, entry in listed.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise CorruptModel(f"{folder / MANIFEST}: {name!r} is not an entry of this folder; {AGAIN}")
        if not path.is_file():
            raise CorruptModel(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CorruptModel(f"{path} has {size} bytes, its manifest says {entry.get('bytes')}; {AGAIN}")
        if sha256(path) != entry.get("sha256"):
            raise CorruptModel(f"{path} was changed: its SHA-256 is not the manifest's; {AGAIN}")


def own_config(folder: Path, values: dict[str, Any]) -> DrafterConfig:
    """The configuration in our own layout, after its manifest was checked."""
    if not (folder / MANIFEST).is_file():
        raise CorruptModel(f"{folder / MANIFEST} is missing: the drafter cannot be verified; {AGAIN}")
    verify(folder)
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        found = f"{values.get('format')!r} {values.get('format_version')!r}"
        raise CorruptModel(
            f"{folder / CONFIG}: format {found} is unknown, this version reads {FORMAT!r} {FORMAT_VERSION}; "
            "use the redrafter that wrote it"
        )
    return _config(folder, {k: v for k, v in values.items() if k not in ("format", "format_version", "metadata")})


def from_apple(folder: Path, values: dict[str, Any], stored: dict[str, Any]) -> tuple[DrafterConfig, dict[str, Any]]:
    """Apple's layout, tensor set A or B (``lm_heads``, ``input_projs``), as ours: configuration and tensors by name."""
    stored = {k.replace("lm_heads.", "lm_head.").replace("input_projs.", "input_proj."): v for k, v in stored.items()}
    head = f"lm_head.{values['num_draft_layers']}.weight"
    if head not in stored or stored[head].ndim != 2:
        raise CorruptModel(f"{folder / WEIGHTS}: the output matrix {head} is missing; {AGAIN}")
    config = _config(
        folder,
        {
            "vocab_size": stored[head].shape[0],
            "hidden_size": values["hidden_size"],
            "num_target_layers": 0,
            "cell": "rnn" if values["rnn"] else "sum",
            "exit_dim": values["exit_dim"],
            "num_blocks": values["num_draft_layers"],
        },
    )

    def ours(name: str) -> str:
        return "head.weight" if name == head else name.replace("lm_head.", "blocks.", 1)

    return config, {ours(name): tensor for name, tensor in stored.items()}


def _config(folder: Path, values: dict[str, Any]) -> DrafterConfig:
    try:
        return DrafterConfig.from_dict(values)
    except CorruptModel as error:
        raise CorruptModel(f"{folder / CONFIG}: {error}") from error
