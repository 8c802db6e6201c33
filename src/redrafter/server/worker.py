"""The thread that owns the engine and the device. Commands come in by a queue, events go out to the event loop."""

from __future__ import annotations

import asyncio
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from redrafter.engine import Engine, EngineLoad, Event, RequestStatistics
from redrafter.errors import OutOfMemory, RedrafterError, RequestFailed, is_out_of_memory
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.policy import Forecast, Policy
from redrafter.server.errors import overloaded, unavailable

_log = logging.getLogger("redrafter.server")

MAX_FAULTS = 3
"""steps in a row that raise before the engine counts as broken"""


class Job(NamedTuple):
    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    speculation: bool = True
    salt: str | None = None
    """only requests of one salt share their prompts' beginnings in the cache"""


class Switch:
    """The engine's policy, and plain decoding while every request in the engine asks for it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._known = tuple(policy.shapes)
        self.shapes = self._known if PLAIN in self._known else (*self._known, PLAIN)
        self.plain = False

    def choose(self, rows: int) -> DecodeConfig:
        return PLAIN if self.plain else self._policy.choose(rows)

    def observe(self, config: DecodeConfig, accepted: Sequence[int], seconds: float | None) -> None:
        if config in self._known and not self.plain:
            self._policy.observe(config, accepted, seconds)

    def table(self) -> list[Forecast]:
        return self._policy.table()


Sink = Callable[[Event], None]
"""Takes a request's events, on the event loop. The last one has a finish reason."""


@dataclass
class _Submit:
    jobs: Sequence[Job]
    added: asyncio.Future[None]


class Worker:
    """``submit`` and ``cancel`` are called on the event loop; the thread calls the engine and nothing else does."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self._switch = Switch(engine.policy)
        self._engine = Engine(engine.backend, self._switch, engine.max_batch, prefix_reuse=engine.prefix_reuse)
        self.capacity = engine.max_batch + max_queue
        """requests that run or wait at most"""
        self._commands: queue.SimpleQueue[_Submit | str | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._held: dict[str, bool] = {}  # id -> speculation, of what the engine has; the thread's own
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="redrafter-engine", daemon=True)
        self._stopping = False
        self._busy_since: float | None = None
        self.load: EngineLoad = engine.load
        """as of the last step"""
        self.failure: str | None = None
        """why the thread died; None while it lives"""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    @property
    def open_requests(self) -> int:
        return len(self._sinks)

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    @property
    def stalled_seconds(self) -> float:
        """How long the present step has been running; 0 between steps."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def submit(self, jobs: Sequence[Job], sinks: Sequence[Sink]) -> None:
        """Queue all of ``jobs`` or none. InvalidRequest: the engine does not take one; ApiError 503: no room now."""
        if not self.alive:
            raise unavailable(f"the engine has stopped: {self.failure or 'it is not running'}")
        if len(self._sinks) + len(jobs) > self.capacity:
            raise overloaded(f"{len(self._sinks)} requests are open and {self.capacity} fit: try again in a second")
        added = asyncio.get_running_loop().create_future()
        self._sinks.update(zip((job.request_id for job in jobs), sinks, strict=True))
        self._commands.put(_Submit(jobs, added))
        try:
            await added
        except asyncio.CancelledError:
            for job in jobs:
                self.cancel(job.request_id)
            raise
        except RedrafterError:
            for job in jobs:
                self._sinks.pop(job.request_id, None)
            raise

    def cancel(self, request_id: str) -> None:
        """Free the request's row before the next step; its sink hears no more. An ended one is ignored."""
        if self._sinks.pop(request_id, None) is not None:
            self._commands.put(request_id)

    def stop(self, error: RedrafterError) -> None:
        """End every open request with ``error`` and the thread with its present step."""
        self._stopping = True
        self._fail_all(error)
        self._commands.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    # On the event loop, called from the thread.

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            sink = self._sinks.get(event.request_id)
            if sink is None:
                continue
            if event.finish_reason is not None:
                del self._sinks[event.request_id]
            sink(event)

    def _fail_all(self, error: RedrafterError) -> None:
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(Event(request_id, (), 0, "error", error, RequestStatistics()))

    def _died(self, reason: str) -> None:
        self.failure = reason
        self._fail_all(unavailable(f"the engine has stopped: {reason}"))

    # In the thread.

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            self._stopping = True

    def _run(self) -> None:
        reason = "its thread ended"
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - whatever ends the thread has to be told
            reason = f"{type(error).__name__}"
            _log.exception("the engine thread died")
        finally:
            if not self._stopping:
                self.failure = reason
                self._call(self._died, reason)
            self._refuse_rest(reason)

    def _serve(self) -> None:
        faults = 0
        while not self._stopping:
            self._take_commands(wait=not self._engine.has_work)
            if self._stopping or not self._engine.has_work:
                continue
            self._busy_since = time.monotonic()
            try:
                events = self._engine.step(lambda: self._take_commands(wait=False))
                faults = 0
            except Exception as error:
                faults += 1
                _log.exception("a step failed")
                if faults == MAX_FAULTS:
                    raise
                events = self._end_all(error)
            self._busy_since = None
            self.load = self._engine.load
            for event in events:
                if event.finish_reason is not None:
                    self._held.pop(event.request_id, None)
            if events:
                # The engine goes on adding to a request's statistics: what is read later is a copy.
                self._call(self._deliver, [e._replace(statistics=copy.copy(e.statistics)) for e in events])

    def _take_commands(self, wait: bool) -> None:
        """Before a step, and after each prompt that it reads: requests that came at once then decode together."""
        self._handle_commands(wait)
        self._switch.plain = bool(self._held) and not any(self._held.values())

    def _handle_commands(self, wait: bool) -> None:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(command, _Submit):
                self._add(command)
            elif isinstance(command, str):
                self._cancel(command)
            else:
                return

    def _cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)
        self._held.pop(request_id, None)

    def _add(self, command: _Submit) -> None:
        try:
            for job in command.jobs:
                if not job.speculation and any(self._held.values()):
                    raise overloaded("plain decoding starts only while no drafted request runs: try again in a second")
                self._engine.add(job.request_id, job.prompt_ids, job.params, cache_salt=job.salt)
                self._held[job.request_id] = job.speculation
        except RedrafterError as error:
            for job in command.jobs:
                self._cancel(job.request_id)
            self._call(_settle, command.added, error)
        else:
            self._call(_settle, command.added, None)

    def _end_all(self, error: Exception) -> list[Event]:
        """After a step that raised: every request ends with what is known of the reason."""
        if isinstance(error, RedrafterError):
            fault: RedrafterError = error
        elif is_out_of_memory(error):
            fault = OutOfMemory("there was no memory for a step: lower --max-batch or --max-context")
        else:
            fault = RequestFailed(f"a step failed: {type(error).__name__}")
        self._engine.cancel_all()
        return [event._replace(finish_reason="error", error=fault) for event in self._engine.step()]

    def _refuse_rest(self, reason: str) -> None:
        """Nothing reads the queue any more: answer those who wait in it."""
        while True:
            try:
                command = self._commands.get(block=False)
            except queue.Empty:
                return
            if isinstance(command, _Submit):
                self._call(_settle, command.added, unavailable(f"the engine has stopped: {reason}"))


def _settle(future: asyncio.Future[None], error: RedrafterError | None) -> None:
    if future.done():  # its request was cancelled meanwhile
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
