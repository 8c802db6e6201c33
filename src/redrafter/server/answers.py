"""The answers to one request on the event loop: events in, chunks out, whoever reads them and however slowly."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from redrafter.errors import RedrafterError
from redrafter.reply import Chunk, Completion, Reply
from redrafter.requests import Event, RequestStatistics, StepTree
from redrafter.server.quiet import Quiet
from redrafter.server.settings import MAX_UNREAD
from redrafter.server.worker import Job, Worker

if TYPE_CHECKING:
    from redrafter.text import Tokenizer


class SlowReader(RedrafterError):
    """A client that does not read what it asked for."""


class Part(NamedTuple):
    """One step of one of the answers."""

    answer: int
    chunk: Chunk
    accepted: int
    """drafted tokens that the target agreed to, those after the answer's end included"""
    nodes: int
    """nodes that the step verified, the root included"""
    seconds: float
    """since the step before, or since the request was added"""
    offset: int
    """characters of the answer before this chunk"""
    tree: StepTree | None
    """what the step verified, if it drafted"""


class Answers:
    """``n`` answers to one prompt. Iterate over the parts; leaving early must end in ``close``."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, jobs: Sequence[Job]) -> None:
        self._worker = worker
        self._jobs = jobs
        self._replies = [Reply(job.request_id, job.prompt_ids, job.params, tokenizer.detokenizer()) for job in jobs]
        self._parts: deque[Part] = deque()
        self._wake = asyncio.Event()
        self._length = [0] * len(jobs)
        self._tokens = [0] * len(jobs)
        self.statistics = [RequestStatistics() for _ in jobs]
        self._given_up = False
        self.accepted: list[int] = []
        self.drafted: list[int] = []
        """accepted and drafted tokens of every drafted step, all answers together"""
        self.arrived = time.perf_counter()
        self.first_token: list[float | None] = [None] * len(jobs)
        self.last_token = [self.arrived] * len(jobs)

    async def start(self) -> None:
        sinks = [lambda event, index=index: self._push(index, event) for index in range(len(self._jobs))]
        await self._worker.submit(self._jobs, sinks)

    def _push(self, index: int, event: Event) -> None:
        reply = self._replies[index]
        if reply.completion is not None:
            return
        if event.tokens:
            self.last_token[index] = time.perf_counter()
            self.first_token[index] = self.first_token[index] or self.last_token[index]
        reply.push(event)
        step = self._step(index, event.statistics)
        while reply.chunks:
            chunk = reply.chunks.popleft()
            self._parts.append(Part(index, chunk, *step, self._length[index], event.tree))
            self._length[index] += len(chunk.text)
            self._tokens[index] += len(chunk.token_ids)
        if reply.completion is not None and not reply.ended:
            self._worker.cancel(reply.request_id)  # a stop string ended it, of which the engine knows nothing
        self._wake.set()
        if len(self._parts) > MAX_UNREAD and not self._given_up:
            self._given_up = True
            self._give_up(SlowReader(f"more than {MAX_UNREAD} steps wait to be read: the request was cancelled"))

    def _step(self, index: int, now: RequestStatistics) -> tuple[int, int, float]:
        """Accepted tokens, nodes and seconds of the step that brought the statistics from what they were to ``now``."""
        before, self.statistics[index] = self.statistics[index], now
        accepted = sum(now.accepted_at_depth) - sum(before.accepted_at_depth)
        if now.drafted_steps > before.drafted_steps:
            self.accepted.append(accepted)
            self.drafted.append(now.drafted_tokens - before.drafted_tokens)
        return accepted, max(now.tree_nodes - before.tree_nodes, 1), now.seconds - before.seconds

    def _give_up(self, error: RedrafterError) -> None:
        self.close()
        for index, reply in enumerate(self._replies):
            self._push(index, Event(reply.request_id, (), 0, "error", error, self.statistics[index]))

    @property
    def prompt_tokens(self) -> int:
        return len(self._jobs[0].prompt_ids)

    @property
    def answer_tokens(self) -> int:
        """Of all answers so far, without those after a stop string."""
        return sum(self._tokens)

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that the first answer found in the cache."""
        return self.statistics[0].reused_tokens

    @property
    def completions(self) -> list[Completion | None]:
        return [reply.completion for reply in self._replies]

    async def parts(self, patience: float) -> AsyncIterator[Part | None]:
        """Every part in the order of the steps; None after ``patience`` seconds without one."""
        quiet = Quiet(patience, self._wake.set)
        try:
            while True:
                while self._parts:
                    yield self._parts.popleft()
                if all(reply.completion is not None for reply in self._replies):
                    return
                self._wake.clear()
                await self._wake.wait()
                if self._parts:
                    quiet.heard()
                else:
                    yield None
        finally:
            quiet.close()

    async def finish(self) -> None:
        """Wait until all answers are complete, without keeping the parts."""
        async for _ in self.parts(patience=3600):
            pass

    def close(self) -> None:
        """The engine forgets those that still run."""
        for reply in self._replies:
            if not reply.ended:
                self._worker.cancel(reply.request_id)
