"""Everything that shapes a training run, and the drafter that it gives a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from redrafter.backends.torch.drafter import CELLS, HEADS, DrafterConfig
from redrafter.errors import InvalidRequest
from redrafter.params import MAX_DRAFT_LENGTH
from redrafter.train.losses import LOSSES

FEATURES = ("fused", "last")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Drafter: features fused (the last hidden state with those of feature_layers, and a trunk over the text) or last;
    feature_layers (): a low, a middle and a high one; 0 in width: the model's own,
    in exit_dim and state_size: the width, in trunk_heads: heads as wide as the model's;
    draft_vocabulary: the most frequent tokens of the data's answers, 0 or the model's size: all.

    Schedule: exactly one of steps, epochs and minutes; the learning rate follows the step, or with minutes the clock.
    batches_per_step: batches of batch_tokens whose gradients are averaged, over all processes. anchors: share of the
    anchors used. Selection: every eval_every steps, simulated tokens per step of eval_texts held-out texts; patience:
    evaluations without a better one until training stops, 0: never.
    """

    cell: str = "gru"
    head: str = "tied"
    features: str = "fused"
    feature_layers: tuple[int, ...] = ()
    width: int = 0
    state_size: int = 0
    context_state: bool = True
    exit_dim: int = 0
    num_blocks: int = 1
    trunk_layers: int = 1
    trunk_heads: int = 0
    trunk_expansion: float = 2.0
    trunk_window: int = 512
    draft_vocabulary: int = 16384
    draft_length: int = 8
    loss: str = "mix"
    mix_decay: float = 1.0
    ce_weight: float = 0.1
    survival_floor: float = 0.3
    steps: int = 0
    epochs: float = 0.0
    minutes: float = 0.0
    anchors: float = 1.0
    row_length: int = 512
    batch_tokens: int = 0
    batches_per_step: int = 1
    chunk: int = 0
    lr: float = 1.5e-3
    lr_end: float = 0.05
    warmup_steps: int = 150
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    eval_every: int = 500
    eval_texts: int = 100
    patience: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        for name, allowed in (("cell", CELLS), ("head", HEADS), ("features", FEATURES), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} is unknown: use {', '.join(allowed)}")
        if (self.steps > 0) + (self.epochs > 0) + (self.minutes > 0) != 1:
            raise InvalidRequest(
                f"steps={self.steps}, epochs={self.epochs}, minutes={self.minutes}: give exactly one of them, over 0"
            )
        if self.features == "last" and self.feature_layers:
            raise InvalidRequest(f"feature_layers={list(self.feature_layers)} need features='fused', not 'last'")
        if not 1 <= self.draft_length <= MAX_DRAFT_LENGTH:
            raise InvalidRequest(f"draft_length={self.draft_length} is not allowed: use 1 to {MAX_DRAFT_LENGTH}")
        if not 0 < self.anchors <= 1:
            raise InvalidRequest(f"anchors={self.anchors} is not allowed: it is a share, over 0 and at most 1")
        for name in ("row_length", "batches_per_step", "lr", "clip", "warmup_steps", "eval_every", "eval_texts"):
            if getattr(self, name) <= 0:
                raise InvalidRequest(f"{name}={getattr(self, name)} is not allowed: it must be over 0")

    def sha256(self) -> str:
        """Of everything that decides the weights."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def make_settings(values: Mapping[str, Any]) -> TrainSettings:
    """From a mapping of strings or numbers; an unknown key or a value of another type raises InvalidRequest."""
    known = {f.name: str(f.type) for f in fields(TrainSettings)}
    made = {}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"{name!r} is no setting of training: use one of {', '.join(known)}")
        made[name] = _typed(name, known[name], value)
    return TrainSettings(**made)


def _typed(name: str, kind: str, value: Any) -> Any:
    """``value`` as ``kind``; texts, as a command line gives them, are read."""
    if isinstance(value, str) and kind != "str":
        try:
            value = json.loads(f"[{value}]") if kind.startswith("tuple") else json.loads(value.lower())
        except ValueError as error:
            raise InvalidRequest(f"{name}={value!r} is not allowed: it must be of type {kind}") from error
    if kind == "float" and type(value) is int:
        value = float(value)
    if kind.startswith("tuple"):
        ok = isinstance(value, list | tuple) and all(type(x) is int for x in value)
    else:
        ok = type(value).__name__ == kind
    if not ok:
        raise InvalidRequest(f"{name}={value!r} is not allowed: it must be of type {kind}")
    return value


def default_layers(layers: int) -> tuple[int, ...]:
    """A low, a middle and a high one: 2, 14 and 24 of 30."""
    wanted = (round(0.08 * layers), layers // 2 - 1, round(0.8 * layers))
    return tuple(sorted({min(max(0, x), layers - 1) for x in wanted}))


def drafter_config(settings: TrainSettings, model: Mapping[str, Any]) -> DrafterConfig:
    """``model``: the target's config.json."""
    hidden, layers, vocabulary = (int(model[k]) for k in ("hidden_size", "num_hidden_layers", "vocab_size"))
    fused = settings.features == "fused"
    width = settings.width or hidden
    own = int(model.get("num_attention_heads", 1))
    heads = settings.trunk_heads or max(1, width * own // hidden)
    if not settings.trunk_heads and width % (2 * heads):
        heads = 1 if width % 2 == 0 else 0
    kv_heads = int(model.get("num_key_value_heads") or own) if width == hidden else heads
    if not heads or heads % kv_heads:
        kv_heads = heads
    return DrafterConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        width=width,
        num_target_layers=layers,
        feature_layers=(settings.feature_layers or default_layers(layers)) if fused else (),
        cell=settings.cell,
        head=settings.head,
        state_size=settings.state_size,
        context_state=settings.context_state,
        exit_dim=settings.exit_dim or width,
        num_blocks=settings.num_blocks,
        trunk_layers=settings.trunk_layers if fused else 0,
        trunk_heads=heads if fused else 0,
        trunk_kv_heads=kv_heads if fused else 0,
        trunk_expansion=settings.trunk_expansion,
        trunk_window=settings.trunk_window,
        draft_vocabulary=settings.draft_vocabulary if settings.draft_vocabulary < vocabulary else 0,
        draft_length=settings.draft_length,
    )


class DrafterBytes(NamedTuple):
    """In bfloat16. ``stored``: the file; ``per_step``: weights read once per step (fusion and trunk); ``per_depth``:
    weights read for every drafted token, as ``bind`` folds them, the draft vocabulary's rows of a tied head included;
    ``table``: what a table of the cell's input for every token takes, and ``per_depth_with_table``."""

    stored: int
    per_step: int
    per_depth: int
    table: int
    per_depth_with_table: int


def drafter_bytes(config: DrafterConfig) -> DrafterBytes:
    import torch

    from redrafter.backends.torch.drafter import Drafter

    with torch.device("meta"):
        weights = {name: p.numel() * 2 for name, p in Drafter(config).named_parameters()}
    once = sum(size for name, size in weights.items() if name.startswith(("fuse", "trunk")))
    every = sum(weights.values()) - once
    if config.cell == "medusa":
        # A depth reads its own block only.
        blocks = sum(size for name, size in weights.items() if name.startswith("depth_blocks"))
        every -= blocks - blocks // config.draft_length
    if config.foldable:
        every += config.vocabulary * config.exit_dim * 2 - weights["exit.weight"]
    elif config.head == "tied":
        every += config.vocabulary * config.hidden_size * 2
    read = sum(weights.get(name, 0) for name in ("embed_proj.weight", "gru_w.weight", "rnn_w.weight"))
    columns = {"gru": 3 * config.state_size, "rnn": config.state_size}.get(config.cell, 0)
    table = config.vocab_size * columns * 2
    stored = sum(weights.values()) + 8 * config.draft_vocabulary
    return DrafterBytes(stored, once, every, table, every - read if table else every)
