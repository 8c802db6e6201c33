"""Tokens per step of a drafter, exactly: the real beam search and tree at every anchor of the target's texts.

``python -m redrafter.train.evaluate --model M --drafter O/drafter --data D --prompts questions.jsonl``. Greedy texts
make verification a comparison with the text itself, so no target forward is needed per step: walking t += accepted + 1
over a text gives the steps that decoding it would take. Tokens per step counts the bonus and the end token.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from redrafter.algorithm.beam import Reading, draft
from redrafter.algorithm.tree import TokenTree, pack
from redrafter.backends.torch.checkpoint import load_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.backends.torch.drafting import DraftState, TorchDrafter
from redrafter.backends.torch.ops import TorchOps
from redrafter.errors import InvalidRequest
from redrafter.params import DecodeConfig
from redrafter.train.chat import chat_frame, encode, end_ids
from redrafter.train.generate import cache_slots
from redrafter.train.samples import Samples
from redrafter.train.target import TrainingTarget
from redrafter.train.writing import Writer, WritingConfig, loops

TREE_SIZES = (4, 8, 12, 16, 24, 32, 48, 64)


class AnchorDrafter(TorchDrafter):
    """A drafter whose contexts were computed beforehand: a reading's features are the context itself."""

    def begin(self, reading: Reading) -> DraftState:
        root = self._embed(reading.tokens)
        return DraftState(reading.features, self.drafter.first_state(reading.features, root), 0)


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
    def lengths(
        self, texts: list[AnswerText], contexts: list[Tensor], shape: DecodeConfig, vocabulary: int, rows: int
    ) -> list[np.ndarray]:
        """Per text [A, N]: accepted drafts at every anchor, for every tree size up to ``shape.tree_size``."""
        device, ops, drafter = self.target.device, TorchOps(), self.worker(vocabulary)
        tail = np.full(shape.draft_length + 1, -1, dtype=np.int64)
        padded = [np.concatenate([t.tokens[t.start - 1 :], tail]) for t in texts]
        windows = [np.lib.stride_tricks.sliding_window_view(p, shape.draft_length + 1)[:-2] for p in padded]
        text_AL = torch.from_numpy(np.concatenate(windows)).to(device)  # root, then what follows it
        context_AD = torch.cat(contexts)
        parts = []
        for first in range(0, len(text_AL), rows):
            here = slice(first, first + rows)
            root = text_AL[here, 0].contiguous()
            ones = torch.ones_like(root)
            reading = Reading(context_AD[here, None], root[:, None], ones, ones)
            tree = pack(ops, draft(ops, drafter, reading, root, shape), root, shape.tree_size)
            parts.append(accepted_lengths(tree, text_AL[here, 1:]).to(torch.int8).cpu().numpy())
        bounds = np.cumsum([len(w) for w in windows])[:-1]
        return np.split(np.concatenate(parts), bounds)


def steps(accepted_A: np.ndarray) -> int:
    """Decoding steps of a text: a step whose root stands before answer token t emits accepted + 1 tokens from t on."""
    count, t = 0, 0
    while t < len(accepted_A):
        count += 1
        t += int(accepted_A[t]) + 1
    return count


def table(texts: list[AnswerText], lengths: list[np.ndarray], sizes: tuple[int, ...]) -> dict[str, Any]:
    """Tokens per step by tree size: all texts, and those that do not loop; the mean over anchors beside it."""
    fine = [not loops(t.tokens[t.start :]) for t in texts]
    out: dict[str, Any] = {"texts": len(texts), "texts_without_loops": sum(fine)}
    for size in sizes:
        column = min(size, lengths[0].shape[1]) - 1
        taken = np.array([steps(x[:, column]) for x in lengths])
        emitted = np.array([len(x) for x in lengths])
        entry = {"tokens_per_step": emitted.sum() / max(1, taken.sum())}
        entry["without_loops"] = emitted[fine].sum() / max(1, taken[fine].sum())
        entry["mean_over_anchors"] = float(np.concatenate([x[:, column] for x in lengths]).mean()) + 1
        out[str(size)] = {k: round(float(v), 4) for k, v in entry.items()}
    return out


def answer_greedily(args: argparse.Namespace, target: TrainingTarget, path: Path) -> list[AnswerText]:
    """The target's own greedy answers to the first turn of every line of a question file."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    records = [json.loads(line) for line in path.read_text().strip().split("\n")]
    questions = [r["turns"][0] for r in records if args.category in str(r.get("category", ""))]
    if not questions:
        raise InvalidRequest(f"{path}: no question has a category that contains {args.category!r}; pass another")
    frame = chat_frame(tokenizer)
    ids = [np.array(x) for x in encode(tokenizer, [frame.render(q) for q in questions])]
    longest = max(len(x) for x in ids)
    need = len(ids) * (longest + args.max_new)
    writer = Writer(target, end_ids(tokenizer, target.config), min(need, cache_slots(target)))
    settings = WritingConfig(max_new=args.max_new, drop_loops=False)
    rows = writer.rows_that_fit(longest, settings)
    texts: list[AnswerText] = []
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        for text in writer.write(part, settings):
            texts.append(AnswerText(np.concatenate([part[text.row], text.tokens]), len(part[text.row])))
    return texts


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="redrafter.train.evaluate", description=__doc__)
    p.add_argument("--model", required=True)
    p.add_argument("--drafter", required=True, type=Path)
    p.add_argument("--data", nargs="*", type=Path, default=[], help="held-out greedy samples of these folders")
    p.add_argument("--texts", type=int, default=400, help="held-out samples at most")
    p.add_argument("--prompts", type=Path, help='JSONL with "turns"; the target answers first turns itself')
    p.add_argument("--category", default="", help="only questions whose category contains this")
    p.add_argument("--max-new", type=int, default=256)
    p.add_argument("--rows", type=int, default=2048, help="anchors per batch")
    p.add_argument("--beam-widths", type=int, nargs="+", default=[8, 4])
    p.add_argument("--vocabularies", type=int, nargs="+", default=[0, 8192], help="0: the drafter's whole one")
    p.add_argument("--branching", type=int, default=8)
    p.add_argument("--draft-length", type=int, default=8)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    p.add_argument("--out", type=Path, help="JSON of the tables")
    return p


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    started = time.monotonic()
    drafter = load_drafter(args.drafter)
    target = TrainingTarget.load(args.model, args.device, getattr(torch, args.dtype), drafter.config.feature_layers)
    sets: dict[str, list[AnswerText]] = {}
    if args.data:
        samples = Samples(args.data)
        chosen = np.flatnonzero((samples.heldout == 1) & (samples.sampled == 0))[: args.texts]
        if len(chosen) == 0:
            raise InvalidRequest(f"no held-out greedy sample in {', '.join(map(str, args.data))}; generate more")
        sets["heldout"] = [AnswerText(samples.text(i), int(samples.answer_start[i])) for i in chosen]
    if args.prompts:
        sets[args.prompts.stem] = answer_greedily(args, target, args.prompts)
    evaluation = Evaluation(target, drafter)
    result: dict[str, Any] = {}
    for name, texts in sets.items():
        contexts = evaluation.contexts(texts)
        for width in args.beam_widths:
            for vocabulary in args.vocabularies:
                shape = DecodeConfig(
                    beam_width=width,
                    branching=args.branching,
                    draft_length=args.draft_length,
                    tree_size=max(TREE_SIZES),
                )
                lengths = evaluation.lengths(texts, contexts, shape, vocabulary, args.rows)
                found = table(texts, lengths, TREE_SIZES)
                result[f"{name} W={width} V={vocabulary or drafter.config.vocabulary}"] = found
                row = "  ".join(f"N={n} {found[str(n)]['tokens_per_step']:.3f}" for n in TREE_SIZES)
                best = found[str(max(TREE_SIZES))]["without_loops"]
                count = f"{found['texts']} texts"
                print(f"{name:16} W={width} V={vocabulary or 'all'}: {row}  no loops {best:.3f}  ({count})", flush=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
