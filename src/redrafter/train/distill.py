"""Distil the target into a drafter: ``python -m redrafter.train.distill --model M --data D --out O``.

The schedule follows the clock: the learning rate's cosine ends when ``--total-seconds`` of training have passed, over
as many calls as it takes (``--seconds`` each, the next with ``--resume``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import CELLS, Drafter, DrafterConfig
from redrafter.errors import InvalidRequest
from redrafter.train.losses import LOSSES, HeadLoss
from redrafter.train.samples import Batch, Samples, batches, frequent_tokens, make_batch
from redrafter.train.target import TrainingTarget
from redrafter.train.trainer import Distiller, StepReport


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="redrafter.train.distill", description=__doc__)
    p.add_argument("--model", required=True, help="folder of the target")
    p.add_argument("--data", required=True, nargs="+", type=Path, help="folders written by redrafter.train.generate")
    p.add_argument("--out", required=True, type=Path, help="drafter/, state.pt and log.jsonl go here")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    p.add_argument("--seconds", type=float, default=540.0, help="wall-clock budget of this call, loading included")
    p.add_argument(
        "--total-seconds", type=float, default=0.0, help="training time of the whole schedule (0: --seconds)"
    )
    p.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    p.add_argument("--margin", type=float, default=8.0, help="seconds of this call kept for the last save")
    p.add_argument("--save-every", type=float, default=180.0)
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    shape = p.add_argument_group("drafter")
    shape.add_argument("--feature-layers", type=int, nargs="*", default=[7, 15, 23])
    shape.add_argument("--cell", choices=CELLS, default="gru")
    shape.add_argument("--exit-dim", type=int, default=576)
    shape.add_argument("--state-size", type=int, default=0)
    shape.add_argument("--context-state", action=argparse.BooleanOptionalAction, default=True)
    shape.add_argument("--num-blocks", type=int, default=1)
    shape.add_argument("--trunk-layers", type=int, default=1)
    shape.add_argument("--trunk-heads", type=int, default=9)
    shape.add_argument("--trunk-kv-heads", type=int, default=3)
    shape.add_argument("--trunk-expansion", type=float, default=2.0)
    shape.add_argument("--trunk-window", type=int, default=512)
    shape.add_argument("--draft-vocabulary", type=int, default=16384)
    shape.add_argument("--draft-length", type=int, default=8)
    train = p.add_argument_group("training")
    train.add_argument("--loss", choices=LOSSES, default="mix")
    train.add_argument("--mix-decay", type=float, default=1.0)
    train.add_argument("--ce-weight", type=float, default=0.1)
    train.add_argument("--survival-floor", type=float, default=0.3)
    train.add_argument("--anchors", type=float, default=1.0, help="share of a row's anchors that is used")
    train.add_argument("--row-length", type=int, default=512)
    train.add_argument("--batch-tokens", type=int, default=32768)
    train.add_argument("--chunk", type=int, default=4096, help="anchors per head product")
    train.add_argument("--lr", type=float, default=1.5e-3)
    train.add_argument("--lr-end", type=float, default=0.05, help="share of --lr at the end")
    train.add_argument("--warmup-steps", type=int, default=150)
    train.add_argument("--weight-decay", type=float, default=0.01)
    train.add_argument("--ema", type=float, default=0.999)
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the loss")
    return p


def learning_rate(args: argparse.Namespace, fraction: float, step: int) -> float:
    """A cosine from --lr to lr_end x --lr over the elapsed fraction of the schedule; the first steps warm up."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return args.lr * (args.lr_end + (1 - args.lr_end) * cosine) * min(1.0, (step + 1) / args.warmup_steps)


@dataclass
class Progress:
    """What a later call needs to go on, besides the tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    anchors: int = 0
    trained_seconds: float = 0.0


class Run:
    """Drafter, average, optimiser and their state on disk."""

    def __init__(self, args: argparse.Namespace, samples: Samples, target: TrainingTarget) -> None:
        self.args, self.samples, self.target = args, samples, target
        self.progress = Progress()
        torch.manual_seed(args.seed)
        config = target.config
        self.drafter = Drafter(
            DrafterConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_target_layers=config.num_hidden_layers,
                head="tied",
                **{k: getattr(args, k) for k in _SHAPE},
            )
        ).to(target.device)
        if args.draft_vocabulary:
            chosen = frequent_tokens(samples.token_counts(config.vocab_size, heldout=False), args.draft_vocabulary)
            self.drafter.token_ids.copy_(torch.from_numpy(chosen))
        self.weights = list(self.drafter.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=args.lr,
            betas=(0.9, 0.95),
            weight_decay=args.weight_decay,
            fused=target.device.type == "cuda",
        )
        if args.resume:
            self._load()
        loss = HeadLoss(args.loss, args.ce_weight, args.mix_decay, args.chunk, args.compile)
        self.distiller = Distiller(target, self.drafter, loss, args.survival_floor)
        if args.resume:
            self.distiller.overlap_K = self._overlap

    def coverage(self, size: int) -> float:
        """Share of held-out answer tokens (training ones if there are none) that the first ``size`` ids cover."""
        counts = self.samples.token_counts(self.target.config.vocab_size, heldout=True)
        if counts.sum() == 0:
            counts = self.samples.token_counts(self.target.config.vocab_size, heldout=False)
        return float(counts[self.drafter.token_ids[:size].cpu().numpy()].sum() / counts.sum())

    def update(self, batch: Batch, fraction: float) -> StepReport:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args, fraction, self.progress.step)
        report = self.distiller.step(batch)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        # A short average at first, so that the random start is forgotten.
        decay = min(self.args.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - decay)
        self.progress.anchors += int((batch.depths > 0).sum())
        return report

    def save(self, metadata: dict[str, Any]) -> None:
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        state = {
            "progress": vars(self.progress),
            "drafter": self.drafter.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "overlap": self.distiller.overlap_K,
            "torch_rng": torch.get_rng_state(),
        }
        aside = args.out / "state.pt.new"
        torch.save(state, aside)
        aside.replace(args.out / "state.pt")
        final = Drafter(self.drafter.config)
        final.load_state_dict(self.drafter.state_dict())
        with torch.no_grad():
            for weight, mean in zip(final.parameters(), self.average, strict=True):
                weight.copy_(mean)
        save_drafter(final.to(torch.bfloat16), args.out / "drafter", metadata)

    def _load(self) -> None:
        state = torch.load(self.args.out / "state.pt", map_location=self.target.device, weights_only=True)
        self.progress = Progress(**state["progress"])
        self.drafter.load_state_dict(state["drafter"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self._overlap: Tensor = state["overlap"]
        torch.set_rng_state(state["torch_rng"].cpu())


_SHAPE = (
    "feature_layers",
    "cell",
    "exit_dim",
    "state_size",
    "context_state",
    "num_blocks",
    "trunk_layers",
    "trunk_heads",
    "trunk_kv_heads",
    "trunk_expansion",
    "trunk_window",
    "draft_vocabulary",
    "draft_length",
)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train until the call's or the schedule's time is over; returns the last log line."""
    called = time.monotonic()
    target = TrainingTarget.load(args.model, args.device, getattr(torch, args.dtype), tuple(args.feature_layers))
    samples = Samples(args.data)
    run = Run(args, samples, target)
    run.distiller.prepare()
    total = args.total_seconds or args.seconds
    before, started = run.progress.trained_seconds, time.monotonic()
    rng = np.random.default_rng([args.seed, run.progress.step])
    args.out.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() * 2 for p in run.weights) + run.drafter.token_ids.numel() * 8 * bool(args.draft_vocabulary)
    header = {
        "samples": len(samples),
        "bytes": size,
        "coverage": {n: round(run.coverage(n), 5) for n in (4096, 8192, 16384) if n <= args.draft_vocabulary},
    }
    line: dict[str, Any] = header
    saved = mark = started
    mark_anchors = run.progress.anchors
    with (args.out / "log.jsonl").open("a") as log:
        _write(log, header)
        while True:
            epoch = run.progress.epoch
            source = batches(samples, args.row_length, args.batch_tokens, args.seed + epoch, run.progress.batch)
            for texts, starts in source:
                keep = None if args.anchors >= 1 else rng.random(sum(len(t) for t in texts)) < args.anchors
                batch = make_batch(texts, starts, args.draft_length, args.chunk, keep)
                report = run.update(batch, (before + time.monotonic() - started) / total)
                run.progress.batch += 1
                now = time.monotonic()
                run.progress.trained_seconds = before + now - started
                # Saving takes seconds: stop early enough to end within the budget.
                over = now - called > args.seconds - args.margin or run.progress.trained_seconds >= total
                if over or run.progress.step % args.log_every == 0 or run.progress.step <= 3:
                    line = {"overlap": _round(report.overlap_K), "hit": _round(report.hit_K)}  # waits for the device
                    line |= vars(run.progress) | {"loss": round(float(report.loss), 4)}
                    line["lr"] = run.optimizer.param_groups[0]["lr"]
                    rate = (run.progress.anchors - mark_anchors) / (time.monotonic() - mark)
                    line["anchors_per_second"] = round(rate)
                    mark, mark_anchors = time.monotonic(), run.progress.anchors
                    _write(log, line)
                if over or now - saved > args.save_every:
                    run.save(_metadata(args, header, line))
                    saved = time.monotonic()
                if over:
                    return line
            if run.progress.batch == 0:
                raise InvalidRequest(
                    f"no training sample fits --row-length {args.row_length}; raise it or generate more"
                )
            run.progress.epoch += 1
            run.progress.batch = 0


def _metadata(args: argparse.Namespace, header: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "data", "out")}
    return {"settings": settings, "data": header, "last": line}


def _round(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]


def _write(log: Any, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def main(argv: list[str] | None = None) -> None:
    train(parser().parse_args(argv))


if __name__ == "__main__":
    main()
