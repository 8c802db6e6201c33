"""Texts on disk: shards of token ids, and the batches that training reads from them.

A shard is a safetensors file: ``tokens`` uint16 (or uint32 for larger vocabularies), ``offsets`` int64 [n + 1],
``answer_start`` int32 [n] (index of the answer's first token within the sample), ``sampled`` uint8 [n] (0 greedy),
``ended`` uint8 [n], ``heldout`` uint8 [n].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from redrafter.errors import InvalidRequest


@dataclass
class ShardWriter:
    """Collects samples and writes one shard per ``flush``."""

    folder: Path
    vocab_size: int
    samples: list[tuple[np.ndarray, int, bool, bool, bool]] = field(default_factory=list)
    shards: int = 0

    def add(self, prompt: np.ndarray, answer: np.ndarray, *, sampled: bool, ended: bool, heldout: bool) -> None:
        self.samples.append((np.concatenate([prompt, answer]), len(prompt), sampled, ended, heldout))

    def flush(self) -> None:
        if not self.samples:
            return
        tokens, start, sampled, ended, heldout = zip(*self.samples, strict=True)
        dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        arrays = {
            "tokens": np.concatenate(tokens).astype(dtype),
            "offsets": np.cumsum([0, *(len(t) for t in tokens)]).astype(np.int64),
            "answer_start": np.array(start, dtype=np.int32),
            "sampled": np.array(sampled, dtype=np.uint8),
            "ended": np.array(ended, dtype=np.uint8),
            "heldout": np.array(heldout, dtype=np.uint8),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, self.folder / f"shard-{self.shards:05d}.safetensors")
        self.shards += 1
        self.samples.clear()


class Samples:
    """All samples of one or more folders, in memory."""

    def __init__(self, folders: list[Path]) -> None:
        files = [f for folder in folders for f in sorted(Path(folder).glob("shard-*.safetensors"))]
        if not files:
            raise InvalidRequest(f"no shard-*.safetensors in {', '.join(map(str, folders))}; run generate first")
        shards = [load_file(f) for f in files]
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


def batches(
    samples: Samples, row_length: int, batch_tokens: int, seed: int, skip: int = 0
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """One epoch over the training split: rows of like length together, ``batch_tokens`` padded tokens each, shuffled.

    Samples longer than ``row_length`` are cut; those whose answer starts beyond it are left out.
    """
    rng = np.random.default_rng(seed)
    length = np.minimum(samples.end - samples.begin, row_length)
    usable = (samples.heldout == 0) & (samples.answer_start + 3 <= length)
    order = rng.permutation(np.flatnonzero(usable))
    order = order[np.argsort(length[order], kind="stable")]
    groups: list[np.ndarray] = []
    first = 0
    while first < len(order):
        # Ascending lengths: the last row of a group is its longest.
        rows = max(1, batch_tokens // int(length[order[first]]))
        while rows > 1 and rows * int(length[order[min(first + rows, len(order)) - 1]]) > batch_tokens:
            rows -= 1
        groups.append(order[first : first + rows])
        first += rows
    for group in rng.permutation(len(groups))[skip:]:
        index = groups[group]
        yield [samples.text(i)[:row_length] for i in index], [int(samples.answer_start[i]) for i in index]
