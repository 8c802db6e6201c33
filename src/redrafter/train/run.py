"""A training run in its folder:

RUN/run.json      what it is a function of        RUN/checkpoints/  where it can go on
RUN/log.jsonl     what happened                   RUN/drafter/      the best drafter so far

The same command goes on where the last one stopped, bit for bit on the CPU: batch n is a function of the data and the
seed, the learning rate of the step (with ``minutes`` of the clock), and everything else is in the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redrafter import __version__
from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.errors import InvalidRequest, TrainingDiverged
from redrafter.models.integrity import read_json
from redrafter.train.cached import CachedStates, write_states
from redrafter.train.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from redrafter.train.conduct import Conduct, Progress, Stop, resolved
from redrafter.train.evaluate import (
    TREE_SIZES,
    Evaluation,
    Walk,
    evaluation_shape,
    heldout_texts,
    table,
    tokens_by_shape,
    training_texts,
)
from redrafter.train.files import ASIDE, remove_leftovers, weights_sha256, write_json
from redrafter.train.learner import Group, Learner
from redrafter.train.losses import HeadLoss
from redrafter.train.report import Reporter, TrainProgress
from redrafter.train.samples import Loader, Samples, frequent_tokens
from redrafter.train.settings import TrainSettings, drafter_bytes, drafter_config
from redrafter.train.target import OpenModel
from redrafter.train.trainer import StepReport

RUN, CHECKPOINTS, DRAFTER = "run.json", "checkpoints", "drafter"
AGREE_EVERY = 10
"""Steps between the looks that several processes take at each other's clocks and signals: each waits for all GPUs."""
SHAPE_TEXTS = 24
"""Texts that the tokens per step of every beam shape are measured on."""


class Run:
    def __init__(
        self, model: OpenModel, samples: Samples, folder: Path, settings: TrainSettings, conduct: Conduct
    ) -> None:
        self.called = time.monotonic()
        self.model, self.samples, self.folder, self.conduct = model, samples, folder, conduct
        self.group = Group(model.device)
        self.settings = settings = resolved(settings, model.device)
        if settings.batches_per_step % self.group.world:
            raise InvalidRequest(
                f"batches_per_step={settings.batches_per_step} is not divisible by {self.group.world} processes: "
                f"use a multiple of {self.group.world}"
            )
        self.config = drafter_config(settings, model.files.config)
        highest = int(samples.tokens.max(initial=0))
        if highest >= self.config.vocab_size:
            raise InvalidRequest(
                f"the data hold token {highest}, the model has {self.config.vocab_size}: make the data with this model"
            )
        self.loader = Loader(
            samples, min(settings.row_length, model.context_limit), settings.batch_tokens, settings.seed
        )
        self.total_steps = settings.steps or math.ceil(
            settings.epochs * self.loader.epoch_batches / settings.batches_per_step
        )
        self.facts = self._facts()
        self._check_folder()
        if conduct.shard_teacher and self.group.world == 1:
            raise InvalidRequest("--shard-teacher needs several processes: start with torchrun --nproc-per-node 2")
        target = model.target(self.config.feature_layers, shard=conduct.shard_teacher)
        counts = samples.token_counts(self.config.vocab_size, heldout=False)
        size = self.config.draft_vocabulary
        chosen = torch.from_numpy(frequent_tokens(counts, size)) if size else torch.arange(self.config.vocab_size)
        self.coverage = round(float(counts[chosen.numpy()].sum() / max(1, counts.sum())), 5)
        loss = HeadLoss(settings.loss, settings.ce_weight, settings.mix_decay, settings.chunk, conduct.compile)
        self.learner = Learner(settings, self.config, target, chosen, loss, self.group)
        self.progress = Progress()
        self.states: CachedStates | None = None
        self._own_anchors = 0
        self._unchecked: list[tuple[int, Tensor]] = []
        self.last: dict[str, Any] = {}

    def _facts(self) -> dict[str, Any]:
        """What the weights are a function of."""
        model, samples, settings = self.model, self.samples, self.settings
        return {
            "redrafter": __version__,
            "model": model.files.name,
            "model_sha256": weights_sha256(model.files),
            "data_sha256": samples.sha256,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            # States on disk are rounded to bfloat16.
            "cached": self.conduct.cached is not None,
            "settings_sha256": settings.sha256(),
            "settings": json.loads(json.dumps(asdict(settings))),
        }

    def _check_folder(self) -> None:
        path = self.folder / RUN
        if not path.is_file():
            if self.group.rank == 0:
                write_json(path, self.facts)
            return
        found = read_json(path)
        old = {**found.get("settings", {}), **found}
        old.setdefault("cached", False)
        for key, value in {**self.facts["settings"], **self.facts}.items():
            if key not in ("settings", "settings_sha256", "model", "redrafter") and old.get(key) != value:
                raise InvalidRequest(
                    f"{self.folder} was begun with {key}={old.get(key)!r}, not {value!r}: use the same or another --out"
                )

    def resume(self, say: Callable[[str], None]) -> None:
        checkpoint = newest_checkpoint(self.folder / CHECKPOINTS, say)
        if checkpoint is None:
            return
        if checkpoint.state["settings_sha256"] != self.facts["settings_sha256"]:
            raise InvalidRequest(f"{self.folder}: its checkpoints are of other settings: use another --out")
        self.progress = Progress(**checkpoint.state["progress"])
        self.learner.load(checkpoint.tensors)
        say(f"going on at step {self.progress.step}")

    # Where the run stands.

    @property
    def fraction(self) -> float:
        if self.total_steps:
            return self.progress.step / self.total_steps
        return self.progress.trained_seconds / (60 * self.settings.minutes)

    @property
    def finished(self) -> bool:
        patience = self.settings.patience
        return self.fraction >= 1 or 0 < patience <= self.progress.without_better

    def fit(self) -> dict[str, Any]:
        """Train to the end of the schedule; returns what was reached. KeyboardInterrupt after a signal, saved."""
        remove_leftovers(self.folder)
        say = _Early()
        self.resume(say)
        leader = self.group.rank == 0
        self.reporter = Reporter(
            self.folder if leader else self.folder / f"rank-{self.group.rank}",
            self.progress.step,
            tensorboard=self.conduct.tensorboard if leader else None,
            quiet=self.conduct.quiet or not leader,
        )
        if self.conduct.shard_teacher:
            held, total = self.learner.target.layer_bytes()
            say(f"sharded teacher: a process holds {held:,} of {total:,} bytes of layers")
        for line in say.lines:
            self.reporter.say(line)
        for manifest in self.samples.manifests:
            if manifest.get("model_sha256", self.facts["model_sha256"]) != self.facts["model_sha256"]:
                self.reporter.say(
                    f"the data were written by other weights ({manifest.get('model')}): prefer the model's own"
                )
        self.texts = heldout_texts(self.samples, self.settings.eval_texts)
        if not self.texts:
            self.texts = training_texts(self.samples, self.settings.eval_texts)
            self.reporter.say(
                "no held-out greedy text in the data: selecting by texts that are trained on; make more data"
            )
        if self.conduct.cached is not None:
            self.states = self._cached(self.conduct.cached)
        self.learner.distiller.prepare()
        with Stop() as stop:
            try:
                self._steps(stop)
            finally:
                self.reporter.close()
                self.learner.release()
                self.group.close()
        if stop.asked:
            raise KeyboardInterrupt
        return self.summary()

    def _cached(self, folder: Path) -> CachedStates:
        """The hidden states on disk; one process alone writes those that are missing."""
        target = self.learner.target
        facts = {key: self.facts[key] for key in ("model_sha256", "data_sha256")}
        facts |= {"feature_layers": list(target.feature_layers), "row_length": self.loader.row_length}
        if self.group.world == 1:
            write_states(folder, target, self.loader, facts, self.reporter.say)
        return CachedStates(folder, self.loader, target.feature_size, facts)

    def _steps(self, stop: Stop) -> None:
        mark, anchors = time.monotonic(), self.progress.anchors
        self._clock = mark
        while not self.finished:
            report = self._step()
            step, ending = self.progress.step, False
            every = (AGREE_EVERY, self.conduct.log_every, self.settings.eval_every, self.conduct.save_every)
            due = self.group.world == 1 or step <= 3 or any(step % n == 0 for n in every)
            if due or step == self.total_steps:
                ending = self._agree(stop.asked or time.monotonic() - self.called > self.conduct.stop_after)
            done = self.finished
            if step % self.conduct.log_every == 0 or step <= 3 or done or ending:
                # Waits for the device, so that a rate is one of finished work.
                self.check_losses()
                self._log(report, (self.progress.anchors - anchors) / max(1e-9, time.monotonic() - mark))
                mark, anchors = time.monotonic(), self.progress.anchors
            evaluating = step % self.settings.eval_every == 0 or done
            if evaluating or ending or step % self.conduct.save_every == 0:
                # This waits for the device, which is training time; evaluating and saving are none.
                self.check_losses()
                self._agree(False)
                if evaluating:
                    self.evaluate()
                self.save()
                mark, anchors = time.monotonic(), self.progress.anchors
                self._clock = mark
            if ending:
                return

    def _agree(self, ending: bool) -> bool:
        """Count the time since the last call as training time, the mean over all processes, and their anchors;
        -> whether any of them is ``ending``. What decides where a run stands is the same in all of them."""
        now = time.monotonic()
        elapsed, anchors, wish = now - self._clock, float(self._own_anchors), float(ending)
        if self.group.world > 1:
            total = torch.tensor([elapsed, anchors, wish], dtype=torch.float64, device=self.model.device)
            self.group.sum([total])
            elapsed, anchors, wish = total.tolist()
        self.progress.trained_seconds += elapsed / self.group.world
        self.progress.anchors += int(anchors)
        self._own_anchors = 0
        self._clock = now
        return wish > 0

    def _step(self) -> StepReport:
        settings, world = self.settings, self.group.world
        numbers = range(self.progress.batch, self.progress.batch + settings.batches_per_step)
        mine = [n for i, n in enumerate(numbers) if i % world == self.group.rank]
        batches = [self.loader.batch(n, settings.draft_length, settings.chunk, settings.anchors) for n in mine]
        if self.states is not None:
            pairs = zip(batches, mine, strict=True)
            batches = [b._replace(features=self.states.features(self.loader.chosen(n))) for b, n in pairs]
        report = self.learner.update(batches, self.progress.step, self.fraction)
        self._unchecked.append((self.progress.batch, report.loss))
        self.progress.step += 1
        self.progress.batch = numbers.stop
        self._own_anchors += sum(int((b.depths > 0).sum()) for b in batches)
        if self.model.device.type == "cpu":
            self.check_losses()
        return report

    def check_losses(self) -> None:
        """Raises TrainingDiverged naming the first batch whose loss is no number. Waits for the device."""
        for batch, loss in self._unchecked:
            if not math.isfinite(float(loss)):
                last = self.settings.batches_per_step + batch - 1
                epoch = batch // self.loader.epoch_batches
                raise TrainingDiverged(
                    f"the loss became {float(loss)} at batches {batch} to {last} (epoch {epoch}, "
                    f"step {self.progress.step}): the last checkpoint is intact; lower lr={self.settings.lr}"
                )
        self._unchecked.clear()

    def _log(self, report: StepReport, rate: float) -> None:
        p = self.progress
        line: dict[str, Any] = {"step": p.step, "batch": p.batch, "anchors": p.anchors}
        line |= {"loss": round(float(report.loss), 5), "lr": self.learner.optimizer.param_groups[0]["lr"]}
        line |= {"overlap": _round(report.overlap_K), "hit": _round(report.hit_K)}
        line |= {"trained_seconds": round(p.trained_seconds, 3), "anchors_per_second": round(rate)}
        self.reporter.log(line)
        left = p.trained_seconds / max(1e-9, self.fraction) * max(0.0, 1 - self.fraction)
        last = self.last.get("tokens_per_step")
        self.reporter.progress(
            TrainProgress(p.step, min(1.0, self.fraction), left, line["loss"], line["hit"], rate, last)
        )

    def evaluate(self) -> None:
        """Simulated tokens per step with the real tree; the best drafter becomes RUN/drafter."""
        p = self.progress
        if p.evaluated == p.step:
            return
        better = torch.zeros(2, device=self.model.device)
        # A sharded target answers only if all processes ask it.
        measuring = self.group.rank == 0 or self.conduct.shard_teacher
        if measuring:
            drafter = self.learner.averaged()
            evaluation = Evaluation(self.learner.target, self.learner.averaged())
            walk = Walk(evaluation_shape(drafter))
            measured = evaluation.lengths(self.texts, evaluation.contexts(self.texts), walk)
            found = table(self.texts, measured.lengths, TREE_SIZES)
            value = found[str(max(TREE_SIZES))]["tokens_per_step"]
            self.last = {"tokens_per_step": value, "merged_share": round(measured.merged, 4)}
            self.reporter.log({"step": p.step, **self.last, "by_tree_size": found})
            if self.group.rank == 0:
                better = torch.tensor([float(value > p.best), value], device=self.model.device)
        self.group.sum([better])
        if better[0] > 0 and measuring:
            shapes = tokens_by_shape(evaluation, self.texts[:SHAPE_TEXTS])
            if self.group.rank == 0:
                self._publish(drafter, found, shapes)
        p.evaluated, p.without_better = p.step, 0 if better[0] > 0 else p.without_better + 1
        if better[0] > 0:
            p.best, p.best_step = round(float(better[1]), 4), p.step

    def _publish(self, drafter: Drafter, found: dict[str, Any], shapes: list[dict[str, Any]]) -> None:
        aside, old, final = (self.folder / name for name in (ASIDE + DRAFTER, ASIDE + "old-" + DRAFTER, DRAFTER))
        data = {"samples": len(self.samples), "coverage": self.coverage}
        trained = {"step": self.progress.step, "anchors": self.progress.anchors}
        measured = {n: v["tokens_per_step"] for n, v in found.items() if n.isdigit()}
        facts = self.facts | {"data": data, "trained": trained, "heldout_tokens_per_step": measured}
        # What a program picks its beam shape from.
        facts |= {"tokens_per_step": shapes, "tokens_per_step_of": f"{len(self.texts[:SHAPE_TEXTS])} texts, greedy"}
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)
        save_drafter(drafter, aside, facts)
        if final.exists():
            final.rename(old)
        os.rename(aside, final)
        shutil.rmtree(old, ignore_errors=True)

    def save(self) -> None:
        if self.group.rank == 0:
            state = {"progress": asdict(self.progress), "settings_sha256": self.facts["settings_sha256"]}
            checkpoint = Checkpoint(self.progress.step, self.learner.tensors(), state)
            save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.conduct.keep)

    def summary(self) -> dict[str, Any]:
        size = drafter_bytes(self.config)
        return {
            "steps": self.progress.step,
            "finished": self.finished,
            "best_tokens_per_step": self.progress.best,
            "best_step": self.progress.best_step,
            "drafter": str(self.folder / DRAFTER),
            "drafter_bytes": size.stored,
            "draft_bytes_per_depth": size.per_depth,
            "coverage": self.coverage,
        }


class _Early:
    """Keeps what is said before there is a reporter."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def _round(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]
