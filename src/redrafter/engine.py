"""Requests, rows, steps: ``add``, ``step``, ``cancel`` are the whole interface. Token ids only; text is upstairs.

Running requests occupy rows 0..n-1 without gaps, so that a step computes nothing for the absent; when one ends, the
last row moves into its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.ops import Array
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.algorithm.tree import TokenTree, unmerged_tokens
from redrafter.errors import InvalidRequest, NonFiniteLogits, RedrafterError
from redrafter.params import PLAIN, DecodeConfig, SamplingParams


class Backend(Protocol):
    """What an engine needs of a backend beside the algorithm's own protocols; one object owns target and drafter."""

    ops: Any
    target: Any
    """an algorithm.step.Target"""
    drafter: Any
    """an algorithm.beam.Drafter, or None"""
    context_limit: int
    eos_ids: frozenset[int]
    run_ahead: bool
    """the engine launches a step before it reads the one before, so that the device never waits for the host"""

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        """One decoding step (``algorithm.step.step``) of every row of ``state``, which are the cache's first rows."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Cache room for so many rows of so many tokens each; raises OutOfMemory."""

    def prefill(self, row: int, token_ids: Sequence[int]) -> Array:
        """Read the tokens into an empty row of target and drafter; features [F] of the last, zeros if there is none."""

    def move_row(self, source: int, to: int) -> None:
        """Row ``to`` becomes what row ``source`` was, in every cache."""

    def sampling(self, requests: Sequence[SamplingHistory]) -> Sampling:
        """The batch's settings as arrays; a field that no request uses is None."""

    def array(self, values: Any) -> Array:
        """int64 array of nested lists."""

    def host(self, array: Array) -> Any:
        """Nested lists of an array."""

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards means something."""


class SamplingHistory(NamedTuple):
    params: SamplingParams
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass
class RequestStatistics:
    """Sums over a request's steps so far. Times are wall seconds since the request was added."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    drafted_steps: int = 0
    accepted_at_depth: list[int] = field(default_factory=list)
    """[d]: steps that accepted at least d + 1 drafted tokens"""
    tree_nodes: int = 0
    """nodes verified, roots included, in drafted steps"""
    unmerged_tokens: int = 0
    """rows the same paths would have taken without merging shared prefixes"""
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Accepted drafted tokens + the bonus, per step; 1 is plain decoding."""
        return self.answer_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding rate: answer tokens after the first over the time since the first."""
        decoding = self.seconds - self.first_token_seconds
        return (self.answer_tokens - self._first) / decoding if decoding > 0 else 0.0

    _first: int = 0

    @property
    def acceptance_per_depth(self) -> list[float]:
        return [n / self.drafted_steps for n in self.accepted_at_depth] if self.drafted_steps else []

    @property
    def removed_share(self) -> float:
        """Share of tokens that merging shared prefixes removed (the paper: 0.3 to 0.6)."""
        return 1 - self.tree_nodes / self.unmerged_tokens if self.unmerged_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        for name in ("tokens_per_step", "tokens_per_second", "acceptance_per_depth", "removed_share"):
            values[name] = getattr(self, name)
        return values


class Event(NamedTuple):
    """What one step did for one request."""

    request_id: str
    tokens: tuple[int, ...]
    drafted: int
    """the first ``drafted`` tokens were drafted and agreed to; the rest (at most one) is the target's own"""
    finish_reason: str | None
    """stop | length | cancelled | error; None while the request runs"""
    error: RedrafterError | None
    statistics: RequestStatistics


@dataclass
class _Request:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    added: float
    answer_ids: list[int] = field(default_factory=list)
    statistics: RequestStatistics = field(default_factory=RequestStatistics)


class Engine:
    """Continuous batching over one target: requests join and leave between steps."""

    def __init__(self, backend: Backend, config: DecodeConfig, max_batch: int = 8) -> None:
        self.backend = backend
        self.config = config if backend.drafter is not None else PLAIN
        self.max_batch = max_batch
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._state: DecodeState | None = None
        self._events: list[Event] = []

    @property
    def context_limit(self) -> int:
        return self.backend.context_limit

    @property
    def speculative(self) -> bool:
        return self.config.speculative

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._events)

    def without_speculation(self) -> Engine:
        """Plain decoding through the same code, weights and cache; one of the two may have work at a time."""
        return Engine(self.backend, PLAIN, self.max_batch)

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request. Raises InvalidRequest for a prompt that cannot be served, before anything is allocated."""
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
        if any(r.request_id == request_id for r in (*self._waiting, *self._running)):
            raise InvalidRequest(f"request id {request_id!r} is already in use: pick another")
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.backend.eos_ids)
        request = _Request(request_id, list(prompt_ids), params, stop, time.perf_counter())
        request.statistics.prompt_tokens = len(prompt_ids)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request now; an unknown id is ignored, since it may just have finished."""
        for request in [r for r in self._waiting if r.request_id == request_id]:
            self._waiting.remove(request)
            self._finish(request, "cancelled")
        for row in [i for i, r in enumerate(self._running) if r.request_id == request_id]:
            self._finish(self._running[row], "cancelled")
            self._leave([row])

    def step(self) -> list[Event]:
        """Admit waiting requests, advance every running one by one step, say what happened."""
        while self._waiting and len(self._running) < self.max_batch:
            self._admit(self._waiting.popleft())
        if self._running:
            assert self._state is not None
            self._state, accepted, tree = self.backend.step(self._state, self.config)
            self._read(accepted, tree)
        events, self._events = self._events, []
        return events

    def _admit(self, request: _Request) -> None:
        """Prefill all but the last prompt token. That one is the root: the first step is a step like any other."""
        backend, row = self.backend, len(self._running)
        tokens = min(len(request.prompt_ids) + request.params.max_new_tokens, self.context_limit)
        started = time.perf_counter()
        try:
            backend.reserve(row + 1, tokens + max(self.config.tree_size, self.config.draft_length + 1))
            features = backend.prefill(row, request.prompt_ids[:-1])
        except RedrafterError as error:
            self._finish(request, "error", error)
            return
        backend.synchronize()
        request.statistics.prefill_seconds = time.perf_counter() - started
        self._running.append(request)
        self._join(request, features)

    def _join(self, request: _Request, features_F: Array) -> None:
        backend = self.backend
        new = first_state(backend, self.config, features_F, request.prompt_ids[-1], len(request.prompt_ids) - 1)
        if self._state is not None:
            new = _map2(lambda old, add: backend.ops.concat([old, add], 0), self._state, new)
        self._state = new._replace(sampling=self._sampling())

    def _sampling(self) -> Sampling:
        return self.backend.sampling([SamplingHistory(r.params, r.prompt_ids, r.answer_ids) for r in self._running])

    def _leave(self, rows: list[int]) -> None:
        """Free these rows; the last ones move into their places."""
        state = self._state
        assert state is not None
        for row in sorted(rows, reverse=True):
            last = len(self._running) - 1
            order = list(range(last))
            if row != last:
                self.backend.move_row(last, row)
                self._running[row] = self._running[last]
                order[row] = last
            self._running.pop()
            index = self.backend.array(order)
            state = _map2(lambda old, _, index=index: old[index], state, state)
        self._state = state._replace(sampling=self._sampling()) if self._running else None

    def _read(self, accepted: Accepted, tree: TokenTree) -> None:
        """Move a step's outcome to the host, request by request."""
        backend, ops = self.backend, self.backend.ops
        tokens, lengths = backend.host(accepted.tokens), backend.host(accepted.length)
        finite = backend.host(accepted.finite)
        nodes = backend.host(ops.sum(tree.live)) if self.speculative else [1] * len(tokens)
        unmerged = backend.host(unmerged_tokens(ops, tree)) if self.speculative else nodes
        now = time.perf_counter()
        ended = []
        for row, request in enumerate(self._running):
            stats = request.statistics
            stats.steps += 1
            stats.seconds = now - request.added
            if self.speculative:
                stats.drafted_steps += 1
                stats.tree_nodes += nodes[row]
                stats.unmerged_tokens += unmerged[row]
                depths = stats.accepted_at_depth or [0] * self.config.draft_length
                stats.accepted_at_depth = [n + (d < lengths[row]) for d, n in enumerate(depths)]
            if not finite[row]:
                error = NonFiniteLogits(
                    f"request {request.request_id!r}: the model's logits after {len(request.answer_ids)} tokens are "
                    "not finite: its weights or this dtype do not work; try --dtype float32"
                )
                self._finish(request, "error", error)
                ended.append(row)
            elif self._emit(request, tokens[row][: lengths[row] + 1], lengths[row]):
                ended.append(row)
        if ended:
            self._leave(ended)

    def _emit(self, request: _Request, tokens: list[int], drafted: int) -> bool:
        """Cut a step's tokens where the request ends; True if it ended."""
        reason = None
        room = min(request.params.max_new_tokens, self.context_limit - len(request.prompt_ids)) - len(
            request.answer_ids
        )
        kept: list[int] = []
        for token in tokens:
            if token in request.stop_ids:
                reason = "stop"
                break
            kept.append(token)
            if len(kept) == room:
                reason = "length"
                break
        stats = request.statistics
        if not request.answer_ids:
            stats.first_token_seconds, stats._first = stats.seconds, len(kept)
        request.answer_ids.extend(kept)
        stats.answer_tokens = len(request.answer_ids)
        event = Event(request.request_id, tuple(kept), min(drafted, len(kept)), reason, None, stats)
        self._events.append(event)
        return reason is not None

    def _finish(self, request: _Request, reason: str, error: RedrafterError | None = None) -> None:
        request.statistics.seconds = time.perf_counter() - request.added
        self._events.append(Event(request.request_id, (), 0, reason, error, request.statistics))


def first_state(backend: Backend, config: DecodeConfig, features_F: Array, root: int, length: int) -> DecodeState:
    """One row whose ``length`` tokens lie in the cache and whose next token, the root, does not."""
    one = backend.array([[0] * (config.draft_length + 1 if config.speculative else 1)])
    return DecodeState(
        reading=Reading(
            features=features_F[None, None] + 0 * one[:, :, None],
            tokens=one + root,
            first=backend.array([length - 1]),
            count=backend.array([1]),
        ),
        root=backend.array([root]),
        lengths=backend.array([length]),
        sampling=Sampling(),
    )


def _map2(function: Any, a: DecodeState, b: DecodeState) -> DecodeState:
    """Apply to every array of two states that has a row axis; the sampling settings are rebuilt by the caller."""
    reading = Reading(*(function(x, y) for x, y in zip(a.reading, b.reading, strict=True)))
    return DecodeState(reading, function(a.root, b.root), function(a.lengths, b.lengths), Sampling())
