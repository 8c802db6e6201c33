"""Tokens per step of a drafter, exactly: the real beam search and tree at every anchor of the target's texts.

The target's own texts make verification a comparison with the text itself, so no target forward is needed per step:
walking t += accepted + 1 over a text gives the steps that decoding it would take. That holds for sampled texts, too,
since the noise of a position is a function of the seed. Tokens per step counts the bonus and the end token.
Legend: B rows, P pool, W beam width, L draft length, N nodes, A anchors, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from redrafter.algorithm.beam import DraftBeams, Reading, draft
from redrafter.algorithm.lookup import Chain
from redrafter.algorithm.noise import gumbel, key_of
from redrafter.algorithm.tree import TokenTree, pack
from redrafter.backends.torch.checkpoint import load_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import DraftState, TorchDrafter
from redrafter.backends.torch.ops import TorchOps
from redrafter.errors import InvalidRequest
from redrafter.params import DecodeConfig, from_mapping
from redrafter.train.chat import encode, end_ids, render
from redrafter.train.data import cache_slots
from redrafter.train.prompts import Prompt
from redrafter.train.recall import Recall
from redrafter.train.samples import Samples
from redrafter.train.settings import drafter_bytes
from redrafter.train.target import OpenModel, TrainingTarget
from redrafter.train.writing import Writer, WritingConfig, loops

TREE_SIZES = (4, 8, 12, 16, 24, 32, 48, 64)
SHAPES = (
    (2, 1, (2,)),
    (2, 2, (4,)),
    (4, 3, (8,)),
    (4, 4, (12,)),
    (4, 5, (16,)),
    (4, 6, (24,)),
    (8, 6, (32, 48)),
    (8, 8, (64,)),
)
"""Beam width, which is also the branching, draft length, tree sizes: for every size the one that pays most somewhere.
Each one more is recorded at start-up, tried now and then, and may be mistaken for the best."""


class AnchorDrafter(TorchDrafter):
    """A drafter whose contexts were computed beforehand: a reading's features are the context itself."""

    chain: Chain | None = None
    """what its next readings recall"""

    def begin(self, reading: Reading) -> DraftState:
        root = self._embed(reading.tokens)
        return DraftState(reading.features, self.drafter.first_state(reading.features, root), 0)

    def recall(self, reading: Reading, length: int) -> Chain | None:  # type: ignore[override]
        return self.chain


class AnswerText(NamedTuple):
    """Prompt and answer; ``start``, at least 2, is the index of the answer's first token."""

    tokens: np.ndarray
    start: int


def accepted_lengths(tree: TokenTree, follow_BL: Tensor) -> Tensor:
    """[B, N]: drafted tokens accepted by the first 1, 2, .. N nodes when the text goes on with ``follow_BL`` [B, L].

    -1 in ``follow_BL`` is past the end of the text and equals no token.
    """
    wanted_BN = follow_BL.gather(1, (tree.depth - 1).clamp(min=0))
    match_BN = ((tree.tokens == wanted_BN) & tree.live) | (tree.depth == 0)
    # A node lies on the accepted path when none of its ancestors, itself included, is wrong.
    broken = torch.bmm(tree.mask.float(), (~match_BN).float()[:, :, None])[:, :, 0]
    return (broken == 0).cumsum(1) - 1


def merged_share(beams: DraftBeams) -> Tensor:
    """[B]: the share of the W x L tokens of the final beams that the tree saves, since beams share their prefixes."""
    rows, slots = beams.tokens.shape
    used = torch.zeros(rows, slots + 1, dtype=torch.bool, device=beams.tokens.device)
    slot = beams.final
    for _ in range(beams.draft_length):
        used.scatter_(1, slot, True)
        # Slot -1, the root, is kept as the last column, which is its own parent.
        slot = torch.where(slot < slots, beams.parent.gather(1, slot.clamp(max=slots - 1)), slot)
        slot = torch.where(slot < 0, slots, slot)
    return 1 - used[:, :slots].sum(1) / (beams.final.shape[1] * beams.draft_length)


class Measured(NamedTuple):
    lengths: list[np.ndarray]
    """per text [A, N]: accepted drafts at every anchor, for every tree size"""
    merged: float
    """mean share of the beams' tokens that merging their prefixes removes"""


class Coupling(NamedTuple):
    """Seed-coupled beams: the temperature and every text's noise key, those that the texts were sampled with."""

    temperature: float
    keys: list[tuple[int, int]]


class Walk(NamedTuple):
    """How texts are followed: accepted drafts for every tree size up to ``shape.tree_size``."""

    shape: DecodeConfig
    vocabulary: int = 0
    """how many of the drafter's most frequent tokens it may propose, 0: all"""
    rows: int = 2048
    """anchors at a time"""
    coupling: Coupling | None = None


class Evaluation:
    """A drafter on its target, in the target's dtype."""

    def __init__(self, target: TrainingTarget, drafter: Drafter) -> None:
        self.target = target
        self.drafter = drafter.to(target.device, target.embedding.dtype).eval().requires_grad_(False)

    def worker(self, vocabulary: int) -> AnchorDrafter:
        reduced = self.drafter.config.draft_vocabulary > 0
        head = self.target.head[self.drafter.token_ids[: vocabulary or None]] if reduced else self.target.head
        if self.drafter.config.head == "own":
            head = self.drafter.head.weight[: vocabulary or None]
        return AnchorDrafter(self.drafter, lambda ids: self.target.embedding[ids], lambda x: x @ head.T, vocabulary)

    @torch.inference_mode()
    def contexts(self, texts: list[AnswerText], batch_tokens: int = 32768) -> list[Tensor]:
        """Per text the contexts [A, D] of one anchor per answer token: its root is the token before that."""
        order = np.argsort([len(t.tokens) for t in texts], kind="stable")
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        width = max(len(t.tokens) for t in texts)
        for group in np.array_split(order, max(1, len(texts) * width // batch_tokens)):
            length = max(len(texts[i].tokens) for i in group)
            tokens = np.zeros((len(group), length), dtype=np.int64)
            for row, i in enumerate(group):
                tokens[row, : len(texts[i].tokens)] = texts[i].tokens
            tokens_BT = torch.from_numpy(tokens).to(self.target.device)
            following = self.target.embedding[tokens_BT.roll(-1, dims=1)]
            position = torch.arange(length, device=tokens_BT.device).expand_as(tokens_BT)
            context_BTD = self.drafter.context(self.target.features(tokens_BT), following, position)
            for row, i in enumerate(group):
                out[i] = context_BTD[row, texts[i].start - 2 : len(texts[i].tokens) - 2]
        return out

    @torch.inference_mode()
    def lengths(self, texts: list[AnswerText], contexts: list[Tensor], walk: Walk) -> Measured:
        """Accepted drafts at every anchor of the texts."""
        device, ops, shape = self.target.device, TorchOps(), walk.shape
        drafter = self.worker(walk.vocabulary)
        tail = np.full(shape.deepest + 1, -1, dtype=np.int64)
        padded = [np.concatenate([t.tokens[t.start - 1 :], tail]) for t in texts]
        windows = [np.lib.stride_tricks.sliding_window_view(p, shape.deepest + 1)[:-2] for p in padded]
        text_AL = torch.from_numpy(np.concatenate(windows)).to(device)  # root, then what follows it
        context_AD, counts = torch.cat(contexts), [len(w) for w in windows]
        recall = None
        if shape.prompt_lookup:
            recall = Recall([t.tokens for t in texts], [t.start - 1 for t in texts], counts, device)
        parts, merged = [], torch.zeros((), device=device)
        for here, noise in self._parts(texts, counts, walk):
            drafter.chain = None if recall is None else recall(here, shape.deepest)
            root = text_AL[here, 0].contiguous()
            ones = torch.ones_like(root)
            reading = Reading(context_AD[here, None], root[:, None], ones, ones)
            beams = draft(ops, drafter, reading, root, shape, noise)
            tree = pack(ops, beams, root, shape.tree_size)
            merged += merged_share(beams).sum()
            parts.append(accepted_lengths(tree, text_AL[here, 1:]).to(torch.int8))
        bounds = np.cumsum(counts)[:-1]
        return Measured(np.split(torch.cat(parts).cpu().numpy(), bounds), float(merged) / len(text_AL))

    def _parts(
        self, texts: list[AnswerText], counts: list[int], walk: Walk
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor] | None]]:
        """Ranges of anchors with their noise: of many texts at once without, of one text at most with it."""
        if walk.coupling is None:
            for first in range(0, sum(counts), walk.rows):
                yield slice(first, first + walk.rows), None
            return
        device, depths = self.target.device, walk.shape.draft_length
        token_V = torch.arange(len(self.target.head), device=device)
        begin = 0
        for text, count, key in zip(texts, counts, walk.coupling.keys, strict=True):
            for first in range(0, count, walk.rows):
                rows = min(walk.rows, count - first)
                # The root of anchor a is token start - 1 + a; the draft of depth k stands k further on.
                position = torch.arange(rows + depths - 1, device=device) + text.start + first
                noise_PV = gumbel(TorchOps(), torch.tensor([key], device=device), position[None], token_V)[0]
                inverse = torch.full((rows,), 1 / walk.coupling.temperature, device=device)
                here = slice(begin + first, begin + first + rows)
                yield here, (noise_PV.unfold(0, depths, 1).transpose(1, 2), inverse)
            begin += count


def visited(accepted_A: np.ndarray) -> list[int]:
    """The anchors at which decoding the text takes a step: one before answer token t emits accepted + 1 tokens."""
    out, t = [], 0
    while t < len(accepted_A):
        out.append(t)
        t += int(accepted_A[t]) + 1
    return out


def steps(accepted_A: np.ndarray) -> int:
    """Decoding steps of a text."""
    return len(visited(accepted_A))


def acceptance(lengths: list[np.ndarray], depths: int) -> list[float]:
    """Per depth the share of steps whose draft of that depth was accepted, of those that came that far."""
    taken = np.concatenate([x[visited(x[:, -1]), -1] for x in lengths])
    reached = [int((taken >= k).sum()) for k in range(depths + 1)]
    return [round(b / a, 4) if a else 0.0 for a, b in pairwise(reached)]


def table(texts: list[AnswerText], lengths: list[np.ndarray], sizes: tuple[int, ...]) -> dict[str, Any]:
    """Tokens per step by tree size: all texts, and those that do not loop; the mean over anchors beside it."""
    fine = [not loops(t.tokens[t.start :]) for t in texts]
    emitted = np.array([len(x) for x in lengths])
    out: dict[str, Any] = {"texts": len(texts), "texts_without_loops": sum(fine), "tokens": int(emitted.sum())}
    for size in sizes:
        column = min(size, lengths[0].shape[1]) - 1
        taken = np.array([steps(x[:, column]) for x in lengths])
        entry = {"tokens_per_step": emitted.sum() / max(1, taken.sum())}
        entry["without_loops"] = emitted[fine].sum() / max(1, taken[fine].sum())
        entry["mean_over_anchors"] = float(np.concatenate([x[:, column] for x in lengths]).mean()) + 1
        out[str(size)] = {k: round(float(v), 4) for k, v in entry.items()} | {"steps": int(taken.sum())}
    return out


def evaluation_shape(drafter: Drafter, beam_width: int = 8, branching: int = 8, prompt_lookup: int = 0) -> DecodeConfig:
    """Beams as the drafter can fill them, and the largest tree of the tables. Without prompt lookup what is measured
    is the drafter alone."""
    vocabulary, length = drafter.config.vocabulary, drafter.config.draft_length
    settings = {"beam_width": beam_width, "branching": min(branching, vocabulary), "draft_length": length}
    return from_mapping(DecodeConfig, settings | {"tree_size": max(TREE_SIZES), "prompt_lookup": prompt_lookup})


def tokens_by_shape(evaluation: Evaluation, texts: list[AnswerText]) -> list[dict[str, Any]]:
    """Tokens per step of the beam shapes that a program picks from at start-up, for the drafter's metadata."""
    contexts = evaluation.contexts(texts)
    config = evaluation.drafter.config
    out: list[dict[str, Any]] = []
    for width, length, sizes in SHAPES:
        if length > config.draft_length and out:
            continue
        length, branching = min(length, config.draft_length), min(width, config.vocabulary)
        shape = DecodeConfig(beam_width=width, branching=branching, draft_length=length, tree_size=max(sizes))
        lengths = evaluation.lengths(texts, contexts, Walk(shape)).lengths
        found = table(texts, lengths, sizes)
        out += [
            {"beam_width": width, "branching": branching, "draft_length": length, "tree_size": size}
            | {"tokens_per_step": round(found[str(size)]["tokens_per_step"], 3)}
            for size in sizes
        ]
    return out


def heldout_texts(samples: Samples, limit: int) -> list[AnswerText]:
    """Greedy texts that training does not see; none if the data have none."""
    chosen = np.flatnonzero((samples.heldout == 1) & (samples.sampled == 0) & (samples.answer_start >= 2))
    return [AnswerText(samples.text(i), int(samples.answer_start[i])) for i in chosen[:limit]]


def training_texts(samples: Samples, limit: int) -> list[AnswerText]:
    """Any texts at all, for data too small to hold some out."""
    return [
        AnswerText(samples.text(i), int(samples.answer_start[i]))
        for i in np.flatnonzero(samples.answer_start >= 2)[:limit]
    ]


class EvalOptions(NamedTuple):
    max_new: int = 256
    beam_width: int = 8
    branching: int = 8
    rows: int = 2048
    vocabulary: int = 0
    """how many of the drafter's most frequent tokens it may propose, 0: all"""
    temperature: float = 0.0
    seed: int = 0
    """of the first prompt, at a temperature over 0"""
    coupled: bool = True
    """at a temperature over 0: beams see the noise that the target adds"""
    prompt_lookup: int = DecodeConfig.prompt_lookup
    """as decoding does; with 0 the figures are the drafter's alone"""
    shapes: bool = False
    """also of every beam shape that a program picks from"""


def noise_keys(seed: int, count: int) -> list[tuple[int, int]]:
    """Of ``count`` prompts; prompt i has seed + i, as in ``redrafter bench``."""
    return [key_of(seed + i) for i in range(count)]


def write_answers(
    target: TrainingTarget, tokenizer: Any, prompts: list[Prompt], options: EvalOptions
) -> list[AnswerText]:
    """The target's own answer to every prompt, in the order of the prompts: greedy, or with each prompt's seed."""
    max_new = options.max_new
    ids = [np.array(x) for x in encode(tokenizer, [render(tokenizer, p.messages) for p in prompts])]
    longest = max(len(x) for x in ids)
    writer = Writer(target, end_ids(tokenizer, target.config), min(len(ids) * (longest + max_new), cache_slots(target)))
    settings = WritingConfig(max_new=max_new, temperature=options.temperature, drop_loops=False)
    keys = noise_keys(options.seed, len(ids)) if options.temperature > 0 else None
    rows = writer.rows_that_fit(longest, settings)
    texts: dict[int, AnswerText] = {}
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        for text in writer.write(part, settings, keys and keys[first : first + rows]):
            texts[first + text.row] = AnswerText(np.concatenate([part[text.row], text.tokens]), len(part[text.row]))
    return [texts[i] for i in range(len(ids))]


def categories(prompts: list[Prompt]) -> dict[str, list[int]]:
    """Indices of all prompts, then by category: the part before the slash, as ``mt_bench`` of ``mt_bench/writing``."""
    out = {"all": list(range(len(prompts)))}
    for i, prompt in enumerate(prompts):
        if prompt.category:
            out.setdefault(prompt.category.split("/")[0], []).append(i)
    return out


def by_category(
    evaluation: Evaluation, texts: list[AnswerText], prompts: list[Prompt], options: EvalOptions
) -> dict[str, Any]:
    """Tokens per step by category and tree size, acceptance per depth, and what merging saves, on answers at hand."""
    shape = evaluation_shape(evaluation.drafter, options.beam_width, options.branching, options.prompt_lookup)
    coupling = None
    if options.temperature > 0 and options.coupled:
        coupling = Coupling(options.temperature, noise_keys(options.seed, len(texts)))
    walk = Walk(shape, options.vocabulary, options.rows, coupling)
    measured = evaluation.lengths(texts, evaluation.contexts(texts), walk)
    found: dict[str, Any] = {}
    for name, index in categories(prompts).items():
        lengths = [measured.lengths[i] for i in index]
        found[name] = table([texts[i] for i in index], lengths, TREE_SIZES)
        found[name]["acceptance_per_depth"] = acceptance(lengths, shape.draft_length)
    settings = {**options._asdict(), "beam_width": shape.beam_width, "branching": shape.branching}
    return {"settings": settings, "merged_share": round(measured.merged, 4), "categories": found}


def evaluate(model: OpenModel, folder: Path, prompts: list[Prompt], options: EvalOptions) -> dict[str, Any]:
    """What a drafter is worth on the target's answers to the prompts."""
    if not prompts:
        raise InvalidRequest("no prompts to evaluate on: give a file with at least one")
    drafter = load_drafter(folder)
    target = model.target(drafter.config.feature_layers)
    tokenizer = AutoTokenizer.from_pretrained(model.files.path, local_files_only=True)
    room = model.context_limit - options.max_new
    if room < 1:
        raise InvalidRequest(
            f"max_new={options.max_new} leaves no room in a context of {model.context_limit}: lower it"
        )
    texts = write_answers(target, tokenizer, prompts, options)
    size = drafter_bytes(drafter.config)
    evaluation = Evaluation(target, drafter)
    shapes = {"tokens_per_step": tokens_by_shape(evaluation, texts)} if options.shapes else {}
    return {
        "model": model.files.name,
        "drafter": str(folder),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": {"stored": size.stored, "per_step": size.per_step, "per_depth": size.per_depth},
        **by_category(evaluation, texts, prompts, options),
        **shapes,
    }


def metrics(result: dict[str, Any], main: str = "mt_bench") -> dict[str, tuple[Any, str]]:
    """Of ``evaluate``'s result, by name, with units: tokens per step of all texts, of every category and of ``other``
    (all but ``main``) at the largest tree, and the drafter's bytes."""
    size = str(max(TREE_SIZES))
    found = result["categories"]
    out: dict[str, tuple[Any, str]] = {"tokens_per_step": (found["all"][size]["tokens_per_step"], "tokens")}
    for name, table_ in found.items():
        if name != "all":
            out[f"tokens_per_step.{name}"] = (table_[size]["tokens_per_step"], "tokens")
    if "other" not in found and main in found and len(found) > 2:
        emitted = sum(t["tokens"] for name, t in found.items() if name not in ("all", main))
        taken = sum(t[size]["steps"] for name, t in found.items() if name not in ("all", main))
        out["tokens_per_step.other"] = (round(emitted / max(1, taken), 4), "tokens")
    out["merged_share"] = (result["merged_share"], "share")
    out["drafter_megabytes"] = (round(result["bytes"]["stored"] / 1e6, 3), "MB")
    out["draft_bytes_per_depth"] = (result["bytes"]["per_depth"], "bytes")
    return out
