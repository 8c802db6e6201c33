"""Which beam shape each step decodes with. It changes the speed and never the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from redrafter.params import DecodeConfig


class Policy(Protocol):
    @property
    def shapes(self) -> Sequence[DecodeConfig]:
        """Every shape that ``choose`` may return, the usual one first: the engine makes room for the largest."""

    def choose(self, rows: int) -> DecodeConfig:
        """The shape of the next step, which advances so many requests."""

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        """A step's outcome: drafted tokens accepted, per request still running. ``seconds``: what the step took; None
        where other work, such as reading a prompt, ran in between."""


class Fixed:
    """Always the same shape."""

    def __init__(self, config: DecodeConfig) -> None:
        self.shapes = (config,)

    def choose(self, rows: int) -> DecodeConfig:
        return self.shapes[0]

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        """Nothing to learn."""
