"""How a training run is conducted: what is asked of it, where it stands, what stops it."""

from __future__ import annotations

import math
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from redrafter.train.settings import TrainSettings


class Conduct(NamedTuple):
    """How a run is watched and kept: nothing here changes the weights."""

    save_every: int = 200
    keep: int = 3
    log_every: int = 50
    stop_after: float = math.inf
    """seconds of this call, after which it saves and ends"""
    tensorboard: Path | None = None
    compile: bool = False
    cached: Path | None = None
    """folder of the target's hidden states, written if need be: then no step passes through the target's layers"""
    shard_teacher: bool = False
    """the target's layers are spread over the processes, for one that does not fit one card"""
    quiet: bool = False


@dataclass
class Progress:
    """The scalars of a checkpoint. ``batch`` is the number of the next batch."""

    step: int = 0
    batch: int = 0
    anchors: int = 0
    trained_seconds: float = 0.0
    best: float = 0.0
    best_step: int = 0
    without_better: int = 0
    evaluated: int = 0


class Stop:
    """SIGTERM and Ctrl-C ask for an end after the current step; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def resolved(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """Sizes that the device decides, made explicit, so that run.json and the checkpoints record them."""
    cpu = device.type == "cpu"
    values = asdict(settings)
    values["batch_tokens"] = settings.batch_tokens or (4096 if cpu else 32768)
    values["chunk"] = settings.chunk or (1024 if cpu else 4096)
    return TrainSettings(**values)
