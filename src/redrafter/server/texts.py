"""The thread that turns texts into tokens: one at a time, off the event loop, and replaced if it does not come back."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable

Work = Callable[[], list[int]]
Done = asyncio.Future[list[int]]


class Texts:
    """Tokenizers are not safe to use from several threads, so there is one. A text that takes too long is given up
    together with its thread, and the next one gets a fresh thread. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Work, Done]] = deque()
        self._thread: _Thread | None = None
        self._busy: asyncio.TimerHandle | None = None
        """gives up the text that the thread works at"""

    async def run(self, work: Work, limit: float) -> list[int]:
        """What ``work`` returns or raises. TimeoutError: not within ``limit`` seconds from now, waiting included."""
        done: Done = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        self._next(limit)
        async with asyncio.timeout(limit):
            return await done

    def _next(self, limit: float) -> None:
        while self._busy is None and self._waiting:
            work, done = self._waiting.popleft()
            if done.done():  # nobody waits for it any more
                continue
            loop = asyncio.get_running_loop()
            if self._thread is None:
                self._thread = _Thread(loop)
            thread = self._thread
            self._busy = loop.call_later(limit, self._give_up, limit)

            def over(result: list[int] | Exception, thread: _Thread = thread, done: Done = done) -> None:
                if done.done():  # nobody waits for it any more
                    pass
                elif isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)
                if thread is self._thread and self._busy is not None:
                    self._busy.cancel()
                    self._busy = None
                    self._next(limit)

            thread.tasks.put((work, over))

    def _give_up(self, limit: float) -> None:
        assert self._thread is not None
        self._thread.tasks.put(None)
        self._thread = self._busy = None
        self._next(limit)

    def close(self) -> None:
        """The thread ends; a text that it works at is its last."""
        if self._thread is not None:
            self._thread.tasks.put(None)


Over = Callable[["list[int] | Exception"], None]


class _Thread:
    """A daemon: a template that never ends does not keep the process from ending."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.tasks: queue.SimpleQueue[tuple[Work, Over] | None] = queue.SimpleQueue()
        self._loop = loop
        threading.Thread(target=self._serve, name="redrafter-text", daemon=True).start()

    def _serve(self) -> None:
        while (task := self.tasks.get()) is not None:
            work, over = task
            try:
                result: list[int] | Exception = work()
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                result = error
            try:
                self._loop.call_soon_threadsafe(over, result)
            except RuntimeError:  # the loop is closed: nobody is left to hear it
                return
