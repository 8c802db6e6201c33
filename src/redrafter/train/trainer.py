"""One training step: the target reads whole rows, the drafter guesses from every anchor of them at once.

The recurrent state starts from zero at each anchor and is fed the text's own tokens (teacher forcing: depth k is only
visited when the drafts before it were right, algorithms.md finding 6). Legend: B rows, T tokens, A anchors, K depths,
D hidden size, F features, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from redrafter.backends.torch.drafter import Drafter
from redrafter.train.losses import HeadLoss, Teaching, survival_weights, teach
from redrafter.train.samples import Batch
from redrafter.train.target import TrainingTarget


class Unrolled(NamedTuple):
    """One depth at every anchor."""

    depth: int
    exit_AD: Tensor
    exists_A: Tensor
    """[A] bool: the text has a token there"""


def unroll(
    drafter: Drafter, context_AD: Tensor, embedding_VD: Tensor, tokens: Tensor, anchor_A: Tensor, depths_A: Tensor
) -> Iterator[Unrolled]:
    """Exit hidden states of depth 1, 2, ...: at depth k the state has read the root (anchor + 1) and k - 1 tokens more.

    ``tokens`` is flat [B x T], ``anchor_A`` flat positions in it.
    """
    last = len(tokens) - 1

    def read(offset: int) -> Tensor:
        return embedding_VD[tokens[(anchor_A + offset).clamp(max=last)]]

    state = drafter.first_state(context_AD, read(1))
    for depth in range(1, drafter.config.draft_length + 1):
        if depth > 1:
            state = drafter.next_state(state, read(depth), depth - 1)
        yield Unrolled(depth, drafter.exit_hidden(context_AD, state), depths_A >= depth)


class StepReport(NamedTuple):
    loss: Tensor
    overlap_K: Tensor
    """[K] mean acceptance per depth, given that the depths before it were right"""
    hit_K: Tensor
    """[K] share of anchors whose first choice was the target's"""


class Distiller(nn.Module):
    """Holds the frozen target's reordered head and the running acceptance that steers the loss.

    A module whose only parameters are the drafter's, so that DistributedDataParallel can wrap the whole loss.
    """

    def __init__(self, target: TrainingTarget, drafter: Drafter, loss: HeadLoss, survival_floor: float) -> None:
        super().__init__()
        self.target, self.drafter, self.loss = target, drafter, loss
        self.survival_floor = survival_floor
        device = target.device
        ids = drafter.token_ids
        rest = torch.ones(drafter.config.vocab_size, dtype=torch.bool, device=device)
        rest[ids] = False
        # The draft vocabulary's rows first: restricting the teacher is then a slice, not a gather.
        order = torch.cat([ids, rest.nonzero()[:, 0]])
        self.place = torch.full((drafter.config.vocab_size,), -1, dtype=torch.int64, device=device)
        self.place[ids] = torch.arange(len(ids), device=device)
        self.teacher_head = target.float_head()[order]
        own = drafter.config.head == "own"
        self.head = drafter.head.weight if own else target.head[ids].contiguous()
        self.overlap_K = torch.full((drafter.config.draft_length,), 0.1, device=device)

    def autocast(self) -> torch.autocast:
        enabled = self.target.embedding.dtype == torch.bfloat16
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=enabled)

    def prepare(self) -> None:
        """Compile what will be compiled, before the clock of the schedule starts."""
        with self.autocast():
            self.loss.prepare(self.head.detach().to(self.target.embedding.dtype))

    def forward(self, batch: Batch) -> StepReport:
        """Of one batch; the loss still has its graph. ``follow`` takes a step's report in afterwards."""
        device = self.target.device
        tokens, taught, anchor, teacher, depths = (_move(torch.from_numpy(x), device) for x in batch[:5])
        if batch.features is None:
            features = self.target.features(tokens)
        else:
            features = _move(batch.features, device).to(self.target.embedding.dtype)
        flat = tokens.flatten()
        with torch.no_grad():
            teaching = self.teach(features, flat, taught)
        weight_K = survival_weights(self.overlap_K, self.survival_floor)
        total = torch.zeros((), device=device)
        overlaps, hits = [], []
        with self.autocast():
            context = self.context(features, tokens).flatten(0, 1)[anchor]
            for depth, exit_AD, exists in unroll(self.drafter, context, self.target.embedding, flat, anchor, depths):
                count = exists.sum().clamp(min=1)
                weight = exists * (weight_K[depth - 1] / count)
                row = (teacher + depth - 1).clamp(max=len(taught) - 1)
                share = self.loss.kl_share(self.overlap_K[depth - 1])
                loss, overlap, hit = self.loss(exit_AD, self.head, teaching, row, weight, share)
                total = total + loss
                overlaps.append((overlap * exists).sum() / count)
                hits.append((hit & exists).sum() / count)
        return StepReport(total, torch.stack(overlaps).detach(), torch.stack(hits))

    def teach(self, features: Tensor, flat: Tensor, taught: Tensor) -> Teaching:
        """The target's distribution at the taught positions; for the loss ``ce`` the text's own next token."""
        hidden = features[..., : self.drafter.config.hidden_size].flatten(0, 1)[taught]
        teaching = teach(hidden, self.teacher_head, self.drafter.config.vocabulary, self.target.softcap)
        if self.loss.kind != "ce":
            return teaching
        return teaching._replace(choice=self.place[flat[(taught + 1).clamp(max=len(flat) - 1)]])

    def follow(self, overlap_K: Tensor) -> None:
        """Move the running acceptance towards a step's."""
        self.overlap_K = torch.lerp(self.overlap_K, overlap_K, 0.05)

    def context(self, features_BTF: Tensor, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] of pairs (features at t, token t + 1); a row's last has no next token and means nothing."""
        following = self.target.embedding[tokens_BT.roll(-1, dims=1)]
        position = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        return self.drafter.context(features_BTF, following, position)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
