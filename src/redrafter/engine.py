"""Requests, rows, steps: ``add``, ``step``, ``cancel`` are the whole interface. Token ids only; text is upstairs.

Running requests occupy rows 0..n-1 without gaps, so that a step computes nothing for the absent; when one ends, the
last row takes its place. Prompts are read into the rows behind them, of all together about a chunk per step: one at a
time or, where that saves time, as many whole ones as a chunk holds. The other rows keep what ended requests left there
until they are needed, for prompts that begin alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.backends.protocol import Backend, Outcome, PromptPart, SamplingHistory
from redrafter.batch import MAX_PENDING, append, first_state, join, last_pair, of_width, take_rows
from redrafter.errors import InvalidRequest, NonFiniteLogits, Overloaded, RedrafterError, named
from redrafter.params import PLAIN, DecodeConfig, SamplingParams
from redrafter.policy import Fixed, Policy
from redrafter.prefix import Prefixes
from redrafter.requests import EngineLoad, Event, Flight, Prefill, Request, RequestStatistics, StepTree, settings_in_use

__all__ = ["Backend", "Engine", "EngineLoad", "Event", "RequestStatistics", "SamplingHistory", "first_state"]


class Engine:
    """Continuous batching over one target: requests join and leave between steps.

    ``config`` is the beam shape of every step, or a policy that picks one for each. ``max_waiting`` bounds the queue
    (None: no bound). ``prefix_reuse``: copy the keys and values of a prompt's beginning from a request that has them.
    """

    def __init__(
        self,
        backend: Backend,
        config: DecodeConfig | Policy,
        max_batch: int = 8,
        *,
        max_waiting: int | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        self.backend = backend
        if backend.drafter is None:
            config = PLAIN
        self.policy: Policy = Fixed(config) if isinstance(config, DecodeConfig) else config
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.prefix_reuse = prefix_reuse
        self._prefixes = Prefixes(backend)
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Prefill] = []
        """between steps at most one, which is longer than a chunk"""
        self._joined: list[Prefill] = []
        """by this step"""
        self._running: list[Request] = []
        self._state: DecodeState | None = None
        self._flights: deque[Flight] = deque()
        self._landed = 0.0
        self._moved = False
        """whether rows changed places since the last launch"""
        self._events: list[Event] = []

    @property
    def context_limit(self) -> int:
        return self.backend.context_limit

    @property
    def config(self) -> DecodeConfig:
        """The usual beam shape."""
        return self.policy.shapes[0]

    @property
    def speculative(self) -> bool:
        return any(shape.speculative for shape in self.policy.shapes)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._running or self._events)

    @property
    def load(self) -> EngineLoad:
        used = sum(request.cached for request in self._running)
        allocated = self.backend.rows * self.backend.slots
        waiting = len(self._waiting) + len(self._prefilling)
        share = used / allocated if allocated else 0.0
        return EngineLoad(len(self._running), waiting, used, len(self.backend.held), share)

    def without_speculation(self) -> Engine:
        """Plain decoding through the same code, weights and cache; one of the two may have work at a time."""
        return Engine(self.backend, PLAIN, self.max_batch, max_waiting=self.max_waiting, prefix_reuse=self.prefix_reuse)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str | None = None
    ) -> None:
        """Queue a request. Raises InvalidRequest for a prompt that cannot be served and Overloaded when the queue is
        full, before anything is allocated. Only requests of one ``cache_salt`` share their prompts' beginnings."""
        limit, vocab = self.context_limit, self.backend.target.vocab_size
        if not prompt_ids:
            raise InvalidRequest("the prompt has 0 tokens: it must have at least 1; give some text")
        if len(prompt_ids) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {limit}: shorten it to at most "
                f"{limit - 1} tokens or raise max_context"
            )
        for token in (min(prompt_ids), max(prompt_ids), *params.logit_bias):
            if not 0 <= token < vocab:
                raise InvalidRequest(f"token id {token} is not in the vocabulary: ids go from 0 to {vocab - 1}")
        if any(request.request_id == request_id for request in self._requests()):
            raise InvalidRequest(f"request id {request_id!r} is already in use: pick another")
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait and the queue holds {self.max_waiting}: try again later"
            )
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.backend.eos_ids)
        room = min(params.max_new_tokens, limit - len(prompt_ids))
        request = Request(request_id, list(prompt_ids), params, stop, room, cache_salt, time.perf_counter())
        request.statistics.prompt_tokens = len(prompt_ids)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request now; an unknown id is ignored, since it may just have finished."""
        for request in [r for r in self._requests() if r.request_id == request_id]:
            self._finish(request, "cancelled")
            if request in self._running:
                self._leave([request])
            elif request in self._waiting:
                self._waiting.remove(request)
            else:
                self._abandon(request)

    def cancel_all(self) -> None:
        """End every request now. After an exception in ``step`` it makes the engine usable again."""
        for request in self._requests():
            self._finish(request, "cancelled")
        self._waiting.clear()
        self._running.clear()
        self._flights.clear()
        self._prefilling.clear()
        self._joined.clear()
        self._state = None

    def step(self, arrive: Callable[[], None] | None = None) -> list[Event]:
        """Read a chunk of waiting prompts, advance every running request by one step, say what happened. ``arrive`` is
        called after each prompt and may ``add`` and ``cancel``: who came while it was read joins in the same step."""
        read = 0
        while more := self._prefill(self.backend.prompt_chunk - read):
            read += more
            if arrive is not None:
                arrive()
        launched = self._launch(alone=not read)
        self._await_prompts()
        ahead = 1 if launched and self.backend.run_ahead else 0
        while len(self._flights) > ahead:
            self._land(self._flights.popleft())
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """What must hold between steps; for tests."""
        requests, count = self._requests(), len(self._running)
        assert count <= self.max_batch
        assert len({r.request_id for r in requests}) == len(requests)
        assert not any(r.ended for r in requests)
        assert (self._state is None) == (count == 0)
        assert self._state is None or all(x.shape[0] == count for x in (self._state.root, *self._state.reading))
        taken = set(range(count)) | {task.row for task in self._prefilling}
        assert len(taken) == count + len(self._prefilling), "a prompt is read into a running request's row"
        assert len(self._prefilling) <= 1
        assert not taken & set(self.backend.held), "a row in use is named as free"
        assert max((*taken, *self.backend.held), default=-1) < max(self.backend.rows, count)
        assert len(self._flights) <= (1 if self.backend.run_ahead else 0)
        assert count or not self._flights
        lengths = [] if self._state is None else self.backend.host(self._state.lengths)
        for request, length in zip(self._running, lengths, strict=True):
            known = len(request.prompt_ids) + len(request.answer_ids) - 1
            assert request.cached == known
            assert known <= length <= known + self._in_flight(request) or (length < 0 and self._in_flight(request))

    def _requests(self) -> list[Request]:
        return [*self._waiting, *(task.request for task in self._prefilling), *self._running]

    def _prefill(self, most: int) -> int:
        """Read a chunk of the prompt that waits longest, unless it is longer than ``most`` tokens, and where that saves
        time the next ones with it; how many tokens."""
        tasks, chunk = self._prefilling, self.backend.prompt_chunk
        while self._waiting and len(self._running) + len(tasks) < self.max_batch:
            left = most - sum(task.left for task in tasks)
            if tasks and not self._reads_with(tasks, self._waiting[0], left):
                break
            self._admit(self._waiting.popleft())
        counts = [min(task.left, chunk) for task in tasks]
        if not tasks or counts[0] > most:
            return 0
        self._read(list(tasks))
        while self._prefilling and not self._prefilling[0].left:
            self._join(self._prefilling.pop(0))
        return sum(counts)

    def _await_prompts(self) -> None:
        """Wait until the prompts of this step are read: behind the launch of the step that follows them, so that the
        device has no pause between."""
        for task in [*self._joined, *self._prefilling]:
            if task.read is not None:
                task.read()
                task.request.statistics.prefill_seconds = time.perf_counter() - task.started
        self._joined.clear()

    def _reads_with(self, tasks: list[Prefill], request: Request, left: int) -> bool:
        """Whether a waiting prompt is read at once with these, which leave room for so many tokens."""
        if not self.backend.reads_together or len(request.prompt_ids) - 1 > left:
            return False
        return not (self.prefix_reuse and self._prefixes.waits(request, [task.request for task in tasks]))

    def _read(self, tasks: list[Prefill]) -> None:
        """The next chunk of each. The last prompt token is left: it is the root, and the request's first step is a step
        like any other."""
        backend, tasks = self.backend, [task for task in tasks if task.left]
        texts = [(task.row, task.request.prompt_ids[:-1], task.request.cached, task.features) for task in tasks]
        try:
            found = backend.prefill_chunks([PromptPart(*text) for text in texts]) if texts else []
            read = backend.mark() if texts and not self._flights else None
        except Exception as error:  # noqa: BLE001 - whatever it was, it was this request's, and the others go on
            if len(tasks) > 1:
                for task in tasks:
                    self._read([task])
                return
            self._finish(tasks[0].request, "error", named(tasks[0].request.request_id, error))
            self._prefilling.remove(tasks[0])
            return
        for task, (features, cached) in zip(tasks, found, strict=True):
            task.features, task.request.cached, task.request.pairs = features, cached, cached - 1
            task.read = read

    def _admit(self, request: Request) -> None:
        """Make room for the request and take what its prompt shares with a text in the cache."""
        shapes = self.policy.shapes
        tokens = len(request.prompt_ids) + request.room + max(max(s.tree_size, s.deepest + 1) for s in shapes)
        if self.backend.run_ahead:  # a step may follow the request's last one
            tokens += max(s.deepest + 1 for s in shapes)
        now = time.perf_counter()
        request.statistics.queue_seconds = now - request.added
        row = len(self._running) + len(self._prefilling)
        try:
            self.backend.reserve(row + 1, tokens)
            running = self._running if self.prefix_reuse else None
            request.cached = request.pairs = self._prefixes.claim(row, request, running, self.max_batch)
        except Exception as error:  # noqa: BLE001 - as above
            self._finish(request, "error", named(request.request_id, error))
            return
        request.statistics.reused_tokens = request.cached
        self._prefilling.append(Prefill(request, row, now))

    def _abandon(self, request: Request) -> None:
        """Stop reading a prompt; what was read of it may serve another."""
        task = next(task for task in self._prefilling if task.request is request)
        if self.prefix_reuse:
            self._prefixes.park(task.row, request)
        self._prefilling.remove(task)

    def _join(self, task: Prefill) -> None:
        request, row, backend = task.request, len(self._running), self.backend
        request.statistics.prefill_seconds = time.perf_counter() - task.started
        self._joined.append(task)
        self._prefixes.relocate(task.row, row, request.cached)
        features = backend.no_features() if task.features is None else task.features
        ids, known = request.prompt_ids, len(request.prompt_ids) - 1
        new = first_state(backend, PLAIN, features, ids[-1], known, request.stop_ids, known + request.room)
        old, self._running = self._state, [*self._running, request]
        if old is not None:
            new = join(backend.ops, old, new)
        self._state = new._replace(sampling=self._sampling(new.sampling, row))

    def _sampling(self, old: Sampling, kept: int) -> Sampling:
        """The settings of the running requests, of which the first ``kept`` are those of ``old``. Their counts of
        answer tokens stay the device's: the host may be a step behind."""
        new = self.backend.sampling([SamplingHistory(r.params, r.prompt_ids, r.answer_ids) for r in self._running])
        if new.penalties is None or old.penalties is None or not kept:
            return new
        parts = [old.penalties.answer[:kept], new.penalties.answer[kept:]]
        return new._replace(penalties=new.penalties._replace(answer=self.backend.ops.concat(parts, 0)))

    def _launch(self, alone: bool) -> bool:
        """Start a step of the running requests, unless all of them are likely to end with the step in flight: waiting
        for what it says costs less than a step that nobody needs."""
        flying, last = (self._flights[-1].requests, self._flights[-1].config) if self._flights else ([], PLAIN)
        if all(r in flying and r.likely_ends(last.speculative) for r in self._running):
            return False
        assert self._state is not None
        backend, before = self.backend, self._state
        config = self.policy.choose(len(self._running))
        assert config in self.policy.shapes, config
        if config.speculative:
            before = before._replace(reading=of_width(backend, before.reading, config.deepest + 1))
        for flight in self._flights:  # what a prompt or a change of shape takes on the host delays its landing
            flight.alone &= alone and config == last
        launched = time.perf_counter()  # before the step: a backend without a queue computes it in the call
        state, accepted, tree = backend.step(before, config)
        if not config.speculative and self.speculative:
            state = state._replace(reading=self._pending(before, state))
        handle = backend.fetch(accepted, tree)
        self._state = state
        self._flights.append(Flight(list(self._running), config, handle, launched, alone and not self._moved))
        self._moved = False
        return True

    def _pending(self, before: DecodeState, after: DecodeState) -> Any:
        """The drafter did not look: what it has to read grows, up to a bound."""
        reading = append(self.backend.ops, before.reading, after.reading)
        if reading.tokens.shape[1] > MAX_PENDING:
            self.backend.catch_up(reading)
            return last_pair(self.backend.ops, reading)
        return reading

    def _land(self, flight: Flight) -> None:
        """Read a step's outcome and hand it out, request by request. Who ended meanwhile gets nothing of it."""
        outcome, config = self.backend.read(flight.handle), flight.config
        now = time.perf_counter()
        seconds = now - max(flight.launched, self._landed) if flight.alone else None
        self._landed = now
        ended: list[Request] = []
        accepted: list[int] = []
        for row, request in enumerate(flight.requests):
            if request.ended:
                continue
            accepted.append(outcome.accepted[row])
            if config.speculative:
                request.pairs = request.cached
            request.cached += 1 + outcome.accepted[row]
            request.statistics.seconds = now - request.added
            request.statistics.count_step(config, outcome.accepted[row], outcome.nodes[row], outcome.unmerged[row])
            self._emit(request, outcome, row, config)
            if request.ended:
                ended.append(request)
        self.policy.observe(config, accepted, seconds)
        if ended:
            self._leave(ended)

    def _emit(self, request: Request, outcome: Outcome, row: int, config: DecodeConfig) -> None:
        if not outcome.finite[row]:
            error = NonFiniteLogits(
                f"request {request.request_id!r}: the model's logits after {len(request.answer_ids)} tokens are "
                "not finite: its weights or this dtype do not work; try --dtype float32"
            )
            request.cached = request.pairs = 0  # nobody may reuse it
            self._finish(request, "error", error)
            return
        drafted = outcome.accepted[row]
        kept, reason = request.take(outcome.tokens[row][: drafted + 1])
        request.ended = reason is not None
        logprobs = request.logprobs(outcome, row, len(kept))
        agreed = outcome.tokens[row][:drafted]
        tree = StepTree(outcome.trees[row], outcome.nodes[row], agreed) if config.speculative else None
        told = (request.statistics, logprobs, tree)
        self._events.append(Event(request.request_id, tuple(kept), min(drafted, len(kept)), reason, None, *told))

    def _leave(self, ended: list[Request]) -> None:
        """Free the rows of these running requests; the last ones take their places."""
        assert self._state is not None
        used = settings_in_use(self._running)
        order = list(range(len(self._running)))
        for request in ended:
            row, last = self._running.index(request), len(self._running) - 1
            if row != last:
                slots = max(r.cached + self._in_flight(r) for r in (request, self._running[last]))
                self._prefixes.exchange(row, last, min(slots, self.backend.slots), keep=self.prefix_reuse)
                self._running[row], order[row] = self._running[last], order[last]
            self._running.pop()
            order.pop()
            if self.prefix_reuse:
                self._prefixes.park(last, request)
        if not self._running:
            self._state = None
            self._flights.clear()
            return
        for flight in self._flights:
            flight.alone = False
        self._moved = True
        state = self.backend.keep_rows(self._state, order) or take_rows(self._state, self.backend.array(order))
        if settings_in_use(self._running) != used:
            state = state._replace(sampling=self._sampling(state.sampling, len(order)))
        self._state = state

    def _in_flight(self, request: Request) -> int:
        """Tokens that steps the host has not read may have put into the request's row, at most."""
        steps = [f.config for f in self._flights if request in f.requests]
        return sum(c.deepest + 1 if c.speculative else 1 for c in steps)

    def _finish(self, request: Request, reason: str, error: RedrafterError | None = None) -> None:
        request.ended = True
        request.statistics.seconds = time.perf_counter() - request.added
        self._events.append(Event(request.request_id, (), 0, reason, error, request.statistics))
