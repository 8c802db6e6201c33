"""Are the files on disk what they should be? Manifests (bytes and SHA-256), safetensors structure, config.json.

A folder that redrafter makes appears whole or not at all: it is written aside under a lock, every file is flushed,
manifest.json comes last, and one rename publishes it. Leftovers of a killed process are removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from redrafter.errors import CorruptModel, ModelNotFound
from redrafter.files import flush, sha256

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit

Progress = Callable[[str], None]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CorruptModel naming the file if it is absent, broken or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptModel(f"{path} is missing: the folder must hold it; copy or download the model again") from None
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{path} cannot be read as JSON ({error}); copy or download the model again") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path} holds a JSON {type(value).__name__}, not an object; copy the model again")
    return value


def write_manifest(folder: Path, extra: dict[str, Any]) -> None:
    """Describe every file of ``folder`` in its manifest.json, with the keys of ``extra`` beside ``files``; flushed."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps({**extra, "files": files}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    flush(partial)
    partial.replace(folder / MANIFEST)
    flush(folder)


def verify_manifest(folder: Path) -> None:
    """Compare every file with manifest.json: presence, bytes, SHA-256. Raises CorruptModel naming a wrong file."""
    fix = f"delete {folder} and fetch or copy it again"
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise CorruptModel(f"{folder / MANIFEST} lists no files; {fix}")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CorruptModel(f"{folder / MANIFEST}: the entry for {name!r} is not {{bytes, sha256}}; {fix}")
        if not path.is_file():
            raise CorruptModel(f"{path} is missing, its manifest lists it; {fix}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CorruptModel(f"{path} has {size} bytes, its manifest says {entry['bytes']}; {fix}")
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise CorruptModel(
                f"{path} has SHA-256 {digest[:16]}…, its manifest says {str(entry['sha256'])[:16]}…: "
                f"the file has changed or is damaged; {fix}"
            )


def check_weights(folder: Path) -> None:
    """Check that the safetensors files are there and whole, without reading weights. Raises CorruptModel.

    Pickled weights (.bin, .pt) are never opened: they can run code.
    """
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CorruptModel(f"{folder / INDEX} has no weight_map; copy or download the model again")
        tensors = {name: _tensor_names(folder / name) for name in sorted(set(shards.values()))}
        for tensor, name in shards.items():
            if tensor not in tensors[name]:
                raise CorruptModel(f"{folder / name} lacks {tensor}, which {INDEX} puts there; download it again")
    elif (folder / WEIGHTS).is_file():
        _tensor_names(folder / WEIGHTS)
    else:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only pickled weights ({pickled[0]}), which are never opened" if pickled else "no weights"
        raise CorruptModel(f"{folder / WEIGHTS} is missing: the folder holds {found}; save it as safetensors")


def _tensor_names(path: Path) -> set[str]:
    """Names in a safetensors header; raises CorruptModel if the file is shorter or longer than the header says."""
    fix = "copy or download the model again"
    if not path.is_file():
        raise CorruptModel(f"{path} is missing; {fix}")
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CorruptModel(f"{path} ({size} bytes) has no whole safetensors header; {fix}")
        try:
            header = json.loads(stream.read(length))
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CorruptModel(f"{path} has a damaged safetensors header ({type(error).__name__}); {fix}") from error
    expected = 8 + length + max(ends.values(), default=0)
    if size != expected:
        raise CorruptModel(f"{path} has {size} bytes, its header says {expected}: it is truncated or damaged; {fix}")
    return set(ends)


def install(folder: Path, build: Callable[[Path], dict[str, Any]], progress: Progress) -> None:
    """Make sure that ``folder`` exists and matches its manifest; otherwise ``build`` it, once for all processes.

    ``build`` fills the empty folder it is given and returns the manifest's extra keys. Raises CorruptModel if a folder
    is already there and damaged (it is left for the user to look at), ModelNotFound if the disk cannot be written.
    """
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder, progress):
                _remove_leftovers(folder)
                if not folder.exists():
                    _build_aside(folder, build)
    except OSError as error:
        raise ModelNotFound(
            f"{folder} cannot be written ({error.strerror or error}): free some space or point REDRAFTER_HOME elsewhere"
        ) from error
    verify_manifest(folder)


@contextlib.contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file beside ``folder``; the system lets go of it when the process dies, however it dies."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that is making {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_aside(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        extra = build(aside)
        for path in aside.iterdir():
            flush(path)
        write_manifest(aside, extra)
        aside.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Only to be called under the lock: whoever wrote these is dead."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(path, ignore_errors=True)
