"""What a run would do, worked out without loading the model; only the device's speed is measured, for an instant."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from redrafter.backends.torch.drafter import DrafterConfig
from redrafter.train.cached import cached_bytes
from redrafter.train.conduct import resolved
from redrafter.train.samples import Loader, Samples
from redrafter.train.settings import TrainSettings, drafter_bytes, drafter_config
from redrafter.train.target import OpenModel

EFFICIENCY = 0.25
"""Share of the speed of a large product that a step reaches: 0.24 on an H200 for SmolLM2-135M, 0.12 s per step."""


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product: the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def step_operations(model: OpenModel, loader: Loader, settings: TrainSettings, config: DrafterConfig) -> float:
    """Of one step: the target's layers, its head at the anchors, the drafter's own weights and head, both ways."""
    weights = sum(path.stat().st_size for path in model.files.path.glob("*.safetensors")) / 2
    vocabulary, hidden = config.vocab_size, config.hidden_size
    length, start = (x[loader.usable].mean() for x in (loader.length, loader.samples.answer_start))
    tokens = settings.batch_tokens * settings.batches_per_step
    anchors = tokens * settings.anchors * max(0.0, 1 - start / length)
    size = drafter_bytes(config)
    head = config.vocabulary * (hidden if config.head == "tied" else config.exit_dim)
    own = max(0, size.per_depth // 2 - head)
    teacher = 2 * tokens * max(0.0, weights - vocabulary * hidden) + 2 * anchors * vocabulary * hidden
    return float(teacher + 6 * tokens * size.per_step / 2 + anchors * config.draft_length * (4 * head + 6 * own))


def estimate(model: OpenModel, samples: Samples, settings: TrainSettings) -> dict[str, Any]:
    """What a run would do, without loading the model. Memory is an estimate, within a third or so; seconds are one
    within a factor of two or three, of one process."""
    settings = resolved(settings, model.device)
    config: DrafterConfig = drafter_config(settings, model.files.config)
    loader = Loader(samples, min(settings.row_length, model.context_limit), settings.batch_tokens, settings.seed)
    steps = settings.steps or math.ceil(settings.epochs * loader.epoch_batches / settings.batches_per_step)
    size = drafter_bytes(config)
    width = torch.finfo(model.dtype).bits // 8
    files = sum(path.stat().st_size for path in model.files.path.glob("*.safetensors"))
    tokens, vocabulary = settings.batch_tokens, config.vocab_size
    working = tokens * config.vocabulary * width + 6 * settings.chunk * config.vocabulary * 4
    working += tokens * config.feature_size * width * 3 + 8 * tokens * config.hidden_size * config.draft_length * 4
    memory = files + vocabulary * config.hidden_size * 4 + size.stored // 2 * 4 * 5 + working
    seconds = settings.minutes * 60
    if steps:
        rate = EFFICIENCY * product_rate(model.device, model.dtype)
        seconds = steps * step_operations(model, loader, settings, config) / rate
    return {
        "steps": steps or None,
        "seconds": max(1, round(seconds)),
        "minutes": settings.minutes or None,
        "batches_per_epoch": loader.epoch_batches,
        "tokens_per_step": settings.batch_tokens * settings.batches_per_step,
        "tokens": settings.batch_tokens * settings.batches_per_step * steps or None,
        "memory_bytes": memory,
        "cached_states_bytes": cached_bytes(loader, config.feature_size),
        "drafter_bytes": size.stored,
        "bytes_read_per_step": size.per_step,
        "bytes_read_per_depth": size.per_depth,
        "drafter": config.to_dict(),
    }
