"""The drafter in training: weights, their moving average, the optimiser, and the running acceptance."""

from __future__ import annotations

import gc
import math
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.train.checkpoint import names_with
from redrafter.train.losses import HeadLoss
from redrafter.train.samples import Batch
from redrafter.train.settings import TrainSettings
from redrafter.train.target import TrainingTarget
from redrafter.train.trainer import Distiller, StepReport


class Group:
    """The processes that train one drafter, as torchrun starts them; one process alone needs no torchrun."""

    def __init__(self, device: torch.device) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def wrap(self, module: nn.Module) -> nn.Module:
        """Its gradients, after a backward pass, are the mean over all processes."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, tensors: list[Tensor]) -> None:
        """In place, over all processes."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def learning_rate(settings: TrainSettings, fraction: float, step: int) -> float:
    """A cosine from lr to lr_end x lr over the elapsed fraction of the schedule; the first steps warm up."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return (
        settings.lr * (settings.lr_end + (1 - settings.lr_end) * cosine) * min(1.0, (step + 1) / settings.warmup_steps)
    )


class Learner:
    def __init__(
        self,
        settings: TrainSettings,
        config: DrafterConfig,
        target: TrainingTarget,
        token_ids: Tensor,
        loss: HeadLoss,
        group: Group,
    ) -> None:
        """``token_ids`` [draft vocabulary]: what the drafter may propose, most frequent first."""
        self.settings, self.target, self.group = settings, target, group
        torch.manual_seed(settings.seed)
        self.drafter = Drafter(config).to(target.device)
        self.drafter.token_ids.copy_(token_ids)
        self.weights = list(self.drafter.parameters())
        self.average = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=target.device.type == "cuda",
        )
        self.distiller = Distiller(target, self.drafter, loss, settings.survival_floor)
        self.parallel = group.wrap(self.distiller)

    def update(self, batches: list[Batch], step: int, fraction: float) -> StepReport:
        """One step on this process's share of the batches; the gradient is the mean over all of them."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, fraction, step)
        reports: list[StepReport] = []
        for batch in batches:
            with self._alone() if len(reports) + 1 < len(batches) else nullcontext():
                report: StepReport = self.parallel(batch)
                report.loss.backward()
            reports.append(report._replace(loss=report.loss.detach(), hit_K=report.hit_K.float()))
        sums = [torch.stack(x).sum(0) for x in zip(*reports, strict=True)]
        self.group.sum(sums)
        for total in sums:
            total.div_(len(batches) * self.group.world)
        for weight in self.weights:
            if weight.grad is None:  # no text of the batch was long enough for any of its anchors
                weight.grad = torch.zeros_like(weight)
            weight.grad.div_(len(batches))
        torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        report = StepReport(*sums)
        self.distiller.follow(report.overlap_K)
        # A short average at first, so that the random start is forgotten.
        decay = min(self.settings.ema, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.average, [w.detach() for w in self.weights], 1 - decay)
        return report

    def release(self) -> None:
        """Let go of the process group, which must not be taken down while DistributedDataParallel still holds it."""
        self.parallel = self.distiller
        gc.collect()

    def _alone(self) -> Any:
        """Gradients are added up here; the last batch of a step averages them over the processes."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def averaged(self) -> Drafter:
        """A copy with the averaged weights, in bfloat16: what is measured and shipped."""
        final = Drafter(self.drafter.config)
        final.load_state_dict(self.drafter.state_dict())
        final.token_ids = self.drafter.token_ids.cpu().clone()
        with torch.no_grad():
            for weight, mean in zip(final.parameters(), self.average, strict=True):
                weight.copy_(mean)
        return final.to(torch.bfloat16)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later call needs to go on as if there had been no interruption."""
        out = {f"weights.{k}": v for k, v in self.drafter.state_dict().items()}
        out |= {f"average.{i}": v for i, v in enumerate(self.average)}
        for index, values in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return out | {"overlap": self.distiller.overlap_K, "torch_rng": torch.get_rng_state()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.drafter.load_state_dict(names_with("weights.", tensors))
        for i, mean in enumerate(self.average):
            mean.copy_(tensors[f"average.{i}"])
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in names_with("optimizer.", tensors).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.distiller.overlap_K = tensors["overlap"].to(self.target.device)
        torch.set_rng_state(tensors["torch_rng"])
