"""A timer for what happens at every step of every stream: to put it off costs a look at the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Quiet:
    """Calls ``ring`` whenever ``seconds`` have passed without ``heard``. Belongs to the running event loop; must be
    closed. The loop's timer is set anew only when it goes off: asyncio's own timeouts take a third of a step's time on
    the loop."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._ring = ring
        self._since = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def heard(self) -> None:
        self._since = self._loop.time()

    def _look(self) -> None:
        now = self._loop.time()
        ringing = now - self._since >= self._seconds
        if ringing:
            self._since = now
        self._timer = self._loop.call_at(self._since + self._seconds, self._look)
        if ringing:
            self._ring()

    def close(self) -> None:
        self._timer.cancel()
