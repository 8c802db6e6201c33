"""Texts on disk: shards of token ids, and the batches that training reads from them.

A shard is a safetensors file: ``tokens`` uint16 (or uint32 for larger vocabularies), ``offsets`` int64 [n + 1],
``answer_start`` int32 [n] (index of the answer's first token within the sample: what comes before it is context, what
follows is taught), ``sampled`` uint8 [n] (0 greedy), ``ended`` uint8 [n], ``heldout`` uint8 [n]. The folder's
manifest.json lists every shard with its SHA-256; a shard that it does not list is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save_file

from redrafter.errors import CorruptModel, InvalidRequest
from redrafter.files import sha256
from redrafter.models.integrity import read_json
from redrafter.train.files import publish, write_json

MANIFEST = "manifest.json"


@dataclass
class ShardWriter:
    """Collects the samples of one shard."""

    vocab_size: int
    samples: list[tuple[np.ndarray, int, bool, bool, bool]] = field(default_factory=list)

    def add(self, prompt: np.ndarray, answer: np.ndarray, *, sampled: bool, ended: bool, heldout: bool) -> None:
        self.samples.append((np.concatenate([prompt, answer]), len(prompt), sampled, ended, heldout))

    def write(self, path: Path, counts: Mapping[str, int]) -> None:
        """The shard appears whole or not at all; ``counts`` go into its header. An empty one is written, too."""
        columns = list(zip(*self.samples, strict=True)) or [[], [], [], [], []]
        tokens, start, sampled, ended, heldout = columns
        dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        arrays = {
            "tokens": np.concatenate([np.zeros(0, np.int64), *tokens]).astype(dtype),
            "offsets": np.cumsum([0, *(len(t) for t in tokens)]).astype(np.int64),
            "answer_start": np.array(start, dtype=np.int32),
            "sampled": np.array(sampled, dtype=np.uint8),
            "ended": np.array(ended, dtype=np.uint8),
            "heldout": np.array(heldout, dtype=np.uint8),
        }
        # One key only: their order in the header is not defined, and equal shards must have equal bytes.
        header = {"counts": json.dumps(counts, sort_keys=True)}
        publish(path, lambda aside: save_file(arrays, aside, header))
        self.samples.clear()


def shard_counts(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, "np") as shard:
            return dict(json.loads(shard.metadata()["counts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptModel(f"{path} is damaged ({error}): delete it and run redrafter data again") from error


def write_manifest(folder: Path, shards: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """``shards``: file name -> SHA-256."""
    write_json(folder / MANIFEST, {**facts, "shards": dict(sorted(shards.items()))})


def read_shards(folder: Path) -> list[dict[str, np.ndarray]]:
    """Every shard of the manifest, its SHA-256 checked. Raises InvalidRequest or CorruptModel naming the file."""
    if not (folder / MANIFEST).is_file():
        raise InvalidRequest(f"{folder} holds no {MANIFEST}: it is no data folder; make one with redrafter data")
    listed = read_json(folder / MANIFEST).get("shards")
    if not isinstance(listed, dict) or not listed:
        raise InvalidRequest(f"{folder / MANIFEST} lists no shard yet: run redrafter data until one is written")
    out = []
    for name, digest in listed.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CorruptModel(f"{path} is missing, the manifest lists it: run redrafter data again")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptModel(f"{path} was changed: its SHA-256 is not the manifest's; delete it, run redrafter data")
        out.append(load(data))
    return out


class Samples:
    """All samples of one or more folders, in memory. ``sha256`` names them: that of the manifests in order."""

    def __init__(self, folders: list[Path]) -> None:
        shards = [shard for folder in folders for shard in read_shards(Path(folder))]
        self.sha256 = hashlib.sha256("".join(sha256(Path(f) / MANIFEST) for f in folders).encode()).hexdigest()
        self.manifests = [read_json(Path(folder) / MANIFEST) for folder in folders]
        self.tokens = np.concatenate([s["tokens"] for s in shards])
        base = np.cumsum([0, *(len(s["tokens"]) for s in shards)])
        self.begin = np.concatenate([s["offsets"][:-1] + b for s, b in zip(shards, base[:-1], strict=True)])
        self.end = np.concatenate([s["offsets"][1:] + b for s, b in zip(shards, base[:-1], strict=True)])
        for name in ("answer_start", "sampled", "ended", "heldout"):
            setattr(self, name, np.concatenate([s[name] for s in shards]))

    answer_start: np.ndarray
    sampled: np.ndarray
    ended: np.ndarray
    heldout: np.ndarray

    def __len__(self) -> int:
        return len(self.begin)

    def text(self, index: int) -> np.ndarray:
        return self.tokens[self.begin[index] : self.end[index]].astype(np.int64)

    def token_counts(self, vocab_size: int, heldout: bool) -> np.ndarray:
        """[V] how often each token stands in the answers of one split."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        inside = np.zeros(len(self.tokens) + 1, dtype=np.int32)
        chosen = self.heldout.astype(bool) == heldout
        np.add.at(inside, (self.begin + self.answer_start)[chosen], 1)
        np.add.at(inside, self.end[chosen], -1)
        counts += np.bincount(self.tokens[np.cumsum(inside)[:-1] > 0], minlength=vocab_size)
        return counts


def frequent_tokens(counts: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` most frequent ids, most frequent first, smaller id first on ties."""
    return np.argsort(-counts, kind="stable")[:size]


class Batch(NamedTuple):
    """Rows padded at the end, and the anchors in them. Anchor t knows the pairs up to t; its root is token t + 1;
    at depth k it predicts token t + 1 + k, whose teacher is the target's distribution at position t + k."""

    tokens: np.ndarray
    """[B, T] int64"""
    taught: np.ndarray
    """[R] flat positions (row x T + t) whose distribution some depth needs, ascending"""
    anchor: np.ndarray
    """[A] flat positions; padded to a multiple of the chunk with position 0"""
    teacher: np.ndarray
    """[A] row of ``taught`` that teaches depth 1; depth k is taught by the row k - 1 further on"""
    depths: np.ndarray
    """[A] depths that exist before the text ends, at most draft_length; 0 for padding"""
    features: Any = None
    """[B, T, F] the target's hidden states, a torch tensor, if they were kept on disk"""


def make_batch(
    texts: list[np.ndarray], starts: list[int], draft_length: int, chunk: int, keep: np.ndarray | None = None
) -> Batch:
    """``keep`` [A] bool chooses among the anchors (None: all), in row order."""
    width = max(len(t) for t in texts)
    tokens = np.zeros((len(texts), width), dtype=np.int64)
    taught, anchor, teacher, depths = [], [], [], []
    count = 0
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        tokens[row, : len(text)] = text
        # The first root is the last token of the prompt: decoding starts there too.
        first, last = max(start - 1, 1), len(text) - 2
        if last < first:
            continue
        here = np.arange(first, last + 1)
        taught.append(row * width + here)
        anchor.append(row * width + here - 1)
        teacher.append(count + np.arange(len(here)))
        depths.append(np.minimum(last + 1 - here, draft_length))
        count += len(here)
    columns = [np.concatenate(x) if x else np.zeros(0, np.int64) for x in (anchor, teacher, depths)]
    if keep is not None:
        columns = [x[keep[: len(x)]] for x in columns]
    missing = -len(columns[0]) % chunk
    columns = [np.concatenate([x, np.zeros(missing, np.int64)]) for x in columns]
    return Batch(tokens, np.concatenate(taught) if taught else np.zeros(0, np.int64), *columns)


class Loader:
    """An endless stream of batches, each named by its number: epoch after epoch, rows of like length together.

    ``batch_tokens`` padded tokens each. Samples longer than ``row_length`` are cut; those whose answer starts beyond it
    are left out. ``usable``: the samples that are trained on; ``length``: of every sample, as it is cut. What batch n
    holds depends on the samples, the settings and the seed only.
    """

    def __init__(self, samples: Samples, row_length: int, batch_tokens: int, seed: int) -> None:
        self.samples, self.row_length, self.batch_tokens, self.seed = samples, row_length, batch_tokens, seed
        self._epoch, self._groups = -1, list[np.ndarray]()
        length = np.minimum(samples.end - samples.begin, row_length)
        usable = (samples.heldout == 0) & (samples.answer_start + 3 <= length)
        self.usable, self.length = np.flatnonzero(usable), length
        if len(self.usable) == 0:
            raise InvalidRequest(f"no training sample fits row_length={row_length}: raise it or make more data")
        self.epoch_batches = len(self._plan(0))

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The number of groups is that of every epoch: it depends on the sorted lengths only."""
        if epoch == self._epoch:
            return self._groups
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.usable)
        order = order[np.argsort(self.length[order], kind="stable")]
        length = self.length[order]
        groups: list[np.ndarray] = []
        first = 0
        while first < len(order):
            # Ascending lengths: the last row of a group is its longest.
            rows = max(1, self.batch_tokens // int(length[first]))
            while rows > 1 and rows * int(length[min(first + rows, len(order)) - 1]) > self.batch_tokens:
                rows -= 1
            groups.append(order[first : first + rows])
            first += rows
        self._epoch, self._groups = epoch, [groups[i] for i in rng.permutation(len(groups))]
        return self._groups

    def chosen(self, number: int) -> np.ndarray:
        """The samples of batch ``number``, row by row."""
        epoch, index = divmod(number, self.epoch_batches)
        return self._plan(epoch)[index]

    def rows(self, number: int) -> tuple[list[np.ndarray], list[int]]:
        """Texts and answer starts of batch ``number``."""
        chosen = self.chosen(number)
        texts = [self.samples.text(i)[: self.row_length] for i in chosen]
        return texts, [int(self.samples.answer_start[i]) for i in chosen]

    def batch(self, number: int, draft_length: int, chunk: int, anchors: float = 1.0) -> Batch:
        """``anchors``: the share of the rows' anchors that is used, drawn from the seed and the number."""
        texts, starts = self.rows(number)
        keep = None
        if anchors < 1:
            keep = np.random.default_rng([self.seed, number, 7]).random(sum(map(len, texts))) < anchors
        return make_batch(texts, starts, draft_length, chunk, keep)
