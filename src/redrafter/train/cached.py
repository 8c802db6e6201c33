"""Hidden states of the target on disk, so that later runs on the same texts need no pass through its layers.

    DIR/states-00000.safetensors   features [tokens, F] bfloat16 of the samples in order; the last hidden state first
    DIR/manifest.json              what they are of, the samples of every shard, and every shard's SHA-256

Only training samples are kept, cut at the row length. A shard appears whole or not at all; a call that was interrupted
goes on at the first shard that is missing. Legend: T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.files import sha256
from redrafter.models.integrity import read_json
from redrafter.train.files import publish, remove_leftovers, write_json
from redrafter.train.samples import Loader
from redrafter.train.target import TrainingTarget

MANIFEST = "manifest.json"
SHARD_BYTES = 2**30
BATCH_TOKENS = 16384


def cached_bytes(loader: Loader, feature_size: int) -> int:
    """On disk, of all training samples."""
    return int(loader.length[loader.usable].sum()) * feature_size * 2


def shards(loader: Loader, feature_size: int) -> list[np.ndarray]:
    """The training samples of every shard, in their order."""
    ends = np.cumsum(loader.length[loader.usable]) * feature_size * 2
    return np.split(loader.usable, np.flatnonzero(np.diff((ends - 1) // SHARD_BYTES)) + 1)


def shard_name(number: int) -> str:
    return f"states-{number:05d}.safetensors"


def write_states(
    folder: Path, target: TrainingTarget, loader: Loader, facts: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Fill ``folder``, from the first shard that is missing. ``facts``: what the states are a function of; a folder of
    others raises InvalidRequest."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    parts = shards(loader, target.feature_size)
    found = listed(folder, facts)
    for number, samples in enumerate(parts):
        path = folder / shard_name(number)
        if path.name in found["shards"]:
            continue
        states = torch.cat(list(_states(target, loader, samples)))
        publish(path, partial(save_file, {"features": states}))
        found["shards"][path.name] = sha256(path)
        write_json(folder / MANIFEST, found)
        tell(f"hidden states: {number + 1} of {len(parts)} shards in {folder}")


def listed(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest, that of an empty cache if there is none."""
    if not (folder / MANIFEST).is_file():
        return {**facts, "shards": {}}
    found = read_json(folder / MANIFEST)
    for key, value in facts.items():
        if found.get(key) != value:
            raise InvalidRequest(
                f"{folder} holds hidden states of {key}={found.get(key)!r}, not {value!r}: use another --cached"
            )
    return found


def _states(target: TrainingTarget, loader: Loader, samples: np.ndarray) -> Iterator[Tensor]:
    """[T, F] bfloat16 of every sample in order, a few at a time through the target."""
    length = loader.length[samples]
    rows = max(1, BATCH_TOKENS // int(length.max()))
    for first in range(0, len(samples), rows):
        part, sizes = samples[first : first + rows], length[first : first + rows].tolist()
        tokens = np.zeros((len(part), max(sizes)), dtype=np.int64)
        for row, (sample, size) in enumerate(zip(part, sizes, strict=True)):
            tokens[row, :size] = loader.samples.text(sample)[:size]
        features = target.features(torch.from_numpy(tokens).to(target.device)).to(torch.bfloat16).cpu()
        for row, size in enumerate(sizes):
            yield features[row, :size]


class CachedStates:
    """States of a folder, read as batches need them. CorruptModel names a shard that is not as it was written."""

    def __init__(self, folder: Path, loader: Loader, feature_size: int, facts: dict[str, Any]) -> None:
        found = listed(folder, facts)["shards"]
        self.feature_size = feature_size
        self._place: dict[int, tuple[Any, int]] = {}
        for number, samples in enumerate(shards(loader, feature_size)):
            path = folder / shard_name(number)
            if path.name not in found:
                raise InvalidRequest(
                    f"{folder} lacks {path.name}: run the same command in one process, which writes it"
                )
            if not path.is_file() or sha256(path) != found[path.name]:
                raise CorruptModel(f"{path} is missing or was changed: delete {folder} and run the same command again")
            view = safe_open(path, "pt").get_slice("features")
            begin = np.cumsum([0, *loader.length[samples]]).tolist()
            self._place |= {sample: (view, at) for sample, at in zip(samples.tolist(), begin, strict=False)}
        self._length = loader.length

    def features(self, samples: np.ndarray) -> Tensor:
        """[B, T, F] bfloat16 of whole rows, zero behind their ends."""
        sizes = self._length[samples].tolist()
        out = torch.zeros(len(samples), max(sizes), self.feature_size, dtype=torch.bfloat16)
        for row, (sample, size) in enumerate(zip(samples.tolist(), sizes, strict=True)):
            view, begin = self._place[sample]
            out[row, :size] = view[begin : begin + size]
        return out
