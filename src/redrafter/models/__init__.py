"""A name -> files on disk. One door for the default model, a local folder, a GGUF file and a Hub id.

Nothing here loads weights into memory for use, imports torch at import time, opens a pickle or runs code that came
with a model. Errors name what was wrong before anything large is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from redrafter.errors import CorruptModel, IncompatibleDrafter, ModelNotFound
from redrafter.files import sha256
from redrafter.models import convert
from redrafter.models.integrity import (
    MANIFEST,
    Progress,
    check_weights,
    install,
    read_json,
    verify_manifest,
    write_manifest,
)
from redrafter.models.support import check_supported

__all__ = [
    "DEFAULT_MODEL",
    "ModelFiles",
    "check_pair",
    "check_supported",
    "home",
    "resolve",
    "resolve_drafter",
    "verify_manifest",
    "write_manifest",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
ASSETS = Path(__file__).parent.parent / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Nothing that can run code: no pickles, no Python files.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt")
# Second copies of the weights in other layouts.
HUB_SKIPPED = ("original/*", "onnx/*", "consolidated*", "metal/*")
# A drafter's key, the target's key, and what a person calls it.
PAIRED_KEYS = (
    ("vocab_size", "vocab_size", "vocabulary"),
    ("hidden_size", "hidden_size", "hidden width"),
    ("num_target_layers", "num_hidden_layers", "number of layers"),
)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: the name asked for, its folder (config.json, safetensors, tokenizer), its parsed config.json."""

    name: str
    path: Path
    config: dict[str, Any]


def home() -> Path:
    """Where fetched and converted models live: REDRAFTER_HOME, by default the user's cache folder."""
    configured = os.environ.get("REDRAFTER_HOME")
    return Path(configured).expanduser() if configured else Path(user_cache_dir("redrafter"))


def resolve(name: str, *, progress: Progress | None = None) -> ModelFiles:
    """Files of ``name``: the default model, a local folder, a .gguf file or a Hub id, in this order.

    ``progress`` is told, one line each, what takes time. Raises ModelNotFound for a name that leads nowhere,
    CorruptModel naming the file for missing, truncated or changed files.
    """
    say = progress or (lambda line: None)
    local = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        folder = home() / "models" / DEFAULT_MODEL
        install(folder, partial(convert.build_default, progress=say), say)
    elif local.is_dir():
        folder = local
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
    elif local.is_file() and local.suffix.lower() == ".gguf":
        folder = _converted(local, say)
    elif HUB_ID.fullmatch(name) and not local.exists():
        folder = _from_hub(name, say)
    else:
        tried = "a file that does not end in .gguf" if local.is_file() else "no such folder or .gguf file, no Hub id"
        raise ModelNotFound(
            f"model {name!r} is not known ({tried}): use {DEFAULT_MODEL}, a folder with config.json and safetensors, "
            f"a .gguf file, or an organisation/name on the Hub"
        )
    config = read_json(folder / "config.json")
    check_weights(folder)
    return ModelFiles(name=name, path=folder, config=config)


def _converted(gguf: Path, progress: Progress) -> Path:
    """The safetensors folder of a GGUF file, made once per contents."""

    def build(folder: Path) -> dict[str, Any]:
        convert.dequantise(gguf, folder, progress)
        return {"source": gguf.name, "gguf_sha256": digest}

    convert.check_gguf(gguf)
    digest = sha256(gguf)
    folder = home() / "gguf" / digest[:16]
    install(folder, build, progress)
    return folder


def _from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"looking for {name} on the Hub and in its cache")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_SKIPPED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelNotFound(
            f"model {name!r} is no local folder, and the Hub did not give it ({type(error).__name__}: {reason}): check "
            f"the name, the network, HF_HUB_OFFLINE and HF_TOKEN, or use {DEFAULT_MODEL}"
        ) from error


def resolve_drafter(spec: str | None, model: ModelFiles) -> Path | None:
    """The drafter's folder (config.json, model.safetensors), checked and paired with ``model``.

    None or "auto" is the drafter shipped for this model, None if there is none; "none" is None; anything else is a
    folder. Raises ModelNotFound, CorruptModel or IncompatibleDrafter.
    """
    if spec == "none":
        return None
    if spec is None or spec == "auto":
        folder = ASSETS / model.name
        if model.name != DEFAULT_MODEL or not folder.is_dir():
            return None
        verify_manifest(folder)
    else:
        folder = Path(spec).expanduser()
        if not folder.is_dir():
            raise ModelNotFound(f"drafter {spec!r} is not a folder: use 'auto', 'none' or a trained drafter's folder")
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
    config = read_json(folder / "config.json")
    check_weights(folder)
    check_pair(config, model.config, spec if spec and spec != "auto" else f"shipped for {model.name}")
    return folder


def check_pair(drafter_config: dict[str, Any], model_config: dict[str, Any], drafter_name: str) -> None:
    """Raises IncompatibleDrafter, naming both numbers, if the drafter was trained for a model of another shape.

    Apple's layout (known by its num_draft_layers) records neither the vocabulary nor the number of layers; it reads the
    last hidden state only, and its vocabulary shows in its weights.
    """
    apple = "num_draft_layers" in drafter_config
    for drafter_key, model_key, meaning in PAIRED_KEYS:
        if apple and drafter_key not in drafter_config:
            continue
        for key, config, whose in ((drafter_key, drafter_config, "drafter"), (model_key, model_config, "model")):
            if key not in config:
                raise CorruptModel(f"{whose} config.json has no {key} (drafter {drafter_name!r}): copy it again")
        theirs, ours = drafter_config[drafter_key], model_config[model_key]
        if theirs != ours:
            raise IncompatibleDrafter(
                f"drafter {drafter_name!r} was trained for a {meaning} of {theirs}, this model's is {ours}: "
                f"use the drafter trained for this model, or 'none'"
            )
