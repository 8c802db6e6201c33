"""Distillation loss per depth, with its gradient written out so that no [anchors, vocabulary] tensor outlives a chunk.

p is the target's distribution restricted to the draft vocabulary and not renormalised, q the drafter's over it:
    loss = lambda KL(p || q) + (1 - lambda) (1 - sum min(p, q)) + ce (-log q(y)),   y = the target's greedy choice.
lambda = exp(-decay a), a = sum min(p, q) so far: KL while the drafter is bad, total variation later (LK loss). ``kl``
fixes lambda = 1, ``tv`` 0; ``ce`` is the last term alone with y = the text's own next token (no teacher).
Legend: A anchors, C anchors of a chunk, R taught positions, D hidden size, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redrafter.train.target import cap

LOSSES = ("ce", "kl", "tv", "mix")


class Teaching(NamedTuple):
    """The target's distribution at R positions."""

    probability: Tensor
    """[R, V] restricted to the draft vocabulary, not renormalised"""
    choice: Tensor
    """[R] draft index of the target's greedy choice, -1 when it is outside the draft vocabulary"""


def teach(hidden_RD: Tensor, head_VD: Tensor, vocabulary: int, softcap: float = 0.0, chunk: int = 2048) -> Teaching:
    """``head_VD`` is the whole head in float32, the draft vocabulary's ``vocabulary`` rows first."""
    probability, choice = [], []
    for hidden in hidden_RD.split(chunk):
        logits = cap(hidden.float() @ head_VD.T, softcap)
        best = logits.argmax(-1)
        choice.append(torch.where(best < vocabulary, best, -1))
        log_total = logits.logsumexp(-1, keepdim=True)
        probability.append((logits[:, :vocabulary] - log_total).exp().to(hidden.dtype))
    return Teaching(torch.cat(probability), torch.cat(choice))


class ChunkLoss(NamedTuple):
    loss: Tensor
    """[] sum of weight x loss"""
    gradient: Tensor
    """[C, V] of that sum with respect to the logits"""
    overlap: Tensor
    """[C] sum min(p, q): the probability that a draw of q would be accepted"""
    hit: Tensor
    """[C] bool: the drafter's first choice is the target's"""


def chunk_loss(
    logits_CV: Tensor, p_CV: Tensor, choice_C: Tensor, weight_C: Tensor, kl_share: Tensor, soft_ce: tuple[float, float]
) -> ChunkLoss:
    soft, ce = soft_ce
    z, p = logits_CV.float(), p_CV.float()
    log_q = z - z.logsumexp(-1, keepdim=True)
    q = log_q.exp()
    mass = p.sum(-1, keepdim=True)
    kl = (p * (p.clamp_min(1e-12).log() - log_q)).sum(-1)
    overlap = torch.minimum(p, q).sum(-1)
    # d overlap / dq = 1 where q < p; through the softmax: q (1[q < p] - sum q 1[q < p]).
    short = torch.where(q < p, q, 0.0)
    known = choice_C >= 0
    label = choice_C.clamp_min(0)[:, None]
    is_label = (torch.arange(z.shape[1], device=z.device) == label) & known[:, None]
    label_log_q = torch.where(is_label, log_q, 0.0).sum(-1)
    loss = soft * (kl_share * kl + (1 - kl_share) * (1 - overlap)) - ce * label_log_q
    gradient = (
        soft * kl_share * (q * mass - p)
        + soft * (1 - kl_share) * (q * short.sum(-1, keepdim=True) - short)
        + ce * (q * known[:, None] - is_label.float())
    )
    hit = z.argmax(-1) == choice_C
    return ChunkLoss((weight_C * loss).sum(), (weight_C[:, None] * gradient).to(logits_CV.dtype), overlap.detach(), hit)


class _HeadLoss(torch.autograd.Function):
    """Head, loss and the gradients with respect to exit hidden state and head, by chunks, all in the forward pass."""

    @staticmethod
    def forward(ctx: Any, exit_AD: Tensor, head: Tensor, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        teaching, row_A, weight_A, kl_share, soft_ce, chunk, function = inputs
        head_VD = head.to(teaching.probability.dtype)
        x = exit_AD.to(head_VD.dtype)
        gradient = torch.empty_like(x)
        head_gradient = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        losses, overlaps, hits = [], [], []
        for first in range(0, len(x), chunk):
            part = slice(first, first + chunk)
            row = row_A[part]
            out = function(
                x[part] @ head_VD.T, teaching.probability[row], teaching.choice[row], weight_A[part], kl_share, soft_ce
            )
            torch.mm(out.gradient, head_VD, out=gradient[part])
            if head_gradient is not None:
                head_gradient += (out.gradient.T @ x[part]).to(head.dtype)
            losses.append(out.loss)
            overlaps.append(out.overlap)
            hits.append(out.hit)
        ctx.save_for_backward(gradient, head_gradient)
        ctx.dtype = exit_AD.dtype
        overlap, hit = torch.cat(overlaps), torch.cat(hits)
        ctx.mark_non_differentiable(overlap, hit)
        return torch.stack(losses).sum(), overlap, hit

    @staticmethod
    def backward(ctx: Any, loss: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None]:
        gradient, head_gradient = ctx.saved_tensors
        to_head = None if head_gradient is None else head_gradient * loss.to(head_gradient.dtype)
        return (gradient * loss.to(gradient.dtype)).to(ctx.dtype), to_head, None


class HeadLoss:
    """The loss through a head, tied or own. ``kind``: of LOSSES; ``decay``: of lambda in a mix; ``ce``: its weight."""

    def __init__(self, kind: str, ce: float, decay: float, chunk: int, compiled: bool) -> None:
        self.kind, self.decay, self.chunk = kind, decay, chunk
        self.soft_ce = (0.0, 1.0) if kind == "ce" else (1.0, ce)
        self.function: Callable[..., ChunkLoss] = torch.compile(chunk_loss, dynamic=False) if compiled else chunk_loss

    def kl_share(self, overlap: Tensor) -> Tensor:
        """lambda of a depth whose overlap so far is ``overlap`` []."""
        if self.kind == "mix":
            return torch.exp(-self.decay * overlap)
        return torch.full_like(overlap, 0.0 if self.kind == "tv" else 1.0)

    @torch.no_grad()
    def prepare(self, head_VD: Tensor) -> None:
        """Compile now, so that the first step is not slow. Call it under the autocast of the training step."""
        logits = head_VD.new_zeros(self.chunk, len(head_VD))
        label = torch.zeros(self.chunk, dtype=torch.int64, device=head_VD.device)
        weight = torch.zeros(self.chunk, device=head_VD.device)
        self.function(logits, logits.clone(), label, weight, weight.sum(), self.soft_ce)

    def __call__(
        self, exit_AD: Tensor, head_VD: Tensor, teaching: Teaching, row_A: Tensor, weight_A: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (loss [], overlap [A], hit [A]). A must be a multiple of the chunk when compiled; padding has weight 0."""
        inputs = (teaching, row_A, weight_A, share, self.soft_ce, self.chunk, self.function)
        return _HeadLoss.apply(exit_AD, head_VD, inputs)


def survival_weights(overlap_K: Tensor, floor: float) -> Tensor:
    """[K] -> [K] summing to 1: w_k = sum over j >= k of prod over i <= j of a_i, the gradient of the expected length.

    a = (1 - floor) overlap + floor: a tree of many nodes survives a depth more often than one path does.
    """
    survive = torch.cumprod((1 - floor) * overlap_K + floor, 0)
    weight = survive.flip(0).cumsum(0).flip(0)
    return weight / weight.sum()
