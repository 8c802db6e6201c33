"""What a run would do, worked out without loading the model."""

from __future__ import annotations

import math
from typing import Any

import torch

from redrafter.backends.torch.drafter import DrafterConfig
from redrafter.train.cached import cached_bytes
from redrafter.train.conduct import resolved
from redrafter.train.samples import Loader, Samples
from redrafter.train.settings import TrainSettings, drafter_bytes, drafter_config
from redrafter.train.target import OpenModel


def estimate(model: OpenModel, samples: Samples, settings: TrainSettings) -> dict[str, Any]:
    """What a run would do, without loading the model. Memory is an estimate, within a third or so."""
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
    return {
        "steps": steps or None,
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
