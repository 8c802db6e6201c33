"""What the host knows of the rows' lengths without waiting for the device."""

from __future__ import annotations

from collections import deque

import mlx.core as mx

from redrafter.backends.base import Fetched


class Lengths:
    """How many tokens the rows of a batch hold, as far as the host can tell while steps are in flight: from outcomes
    that it has read anyway. Asking the device would wait, and move what the next step is about to read."""

    def __init__(self) -> None:
        self._array: mx.array | None = None
        self._rows: list[int] = []
        """before the steps in flight"""
        self._flights: deque[tuple[Fetched, int]] = deque()

    def about(self, lengths_B: mx.array) -> bool:
        """Whether these are the lengths that the last step left."""
        return lengths_B is self._array

    def start(self, lengths_B: mx.array, rows: list[int]) -> None:
        self._array, self._rows = lengths_B, rows
        self._flights.clear()

    def launched(self, after_B: mx.array, told: Fetched, depths: int) -> None:
        """A step of at most ``depths`` tokens per row."""
        self._array = after_B
        self._flights.append((told, depths))

    def landed(self, told: Fetched, accepted: list[int]) -> None:
        if self._flights and self._flights[0][0] is told:
            self._flights.popleft()
            self._rows = [row + 1 + more for row, more in zip(self._rows, accepted, strict=True)]

    @property
    def longest(self) -> int:
        """No row is longer."""
        return max(self._rows) + sum(depths for _, depths in self._flights)

    @property
    def exact(self) -> bool:
        """Whether there is one row, of exactly ``longest`` tokens."""
        return len(self._rows) == 1 and all(depths == 1 for _, depths in self._flights)
