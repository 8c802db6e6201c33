"""A request on its way through the engine, what is said about it, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from redrafter.algorithm.ops import Array
from redrafter.backends.protocol import Outcome
from redrafter.errors import RedrafterError
from redrafter.params import DecodeConfig, SamplingParams


@dataclass
class RequestStatistics:
    """Sums over a request's steps so far. Times are wall seconds since the request was added."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    drafted_steps: int = 0
    drafted_tokens: int = 0
    """the draft length of every drafted step, added up"""
    accepted_at_depth: list[int] = field(default_factory=list)
    """[d]: steps that accepted at least d + 1 drafted tokens"""
    tree_nodes: int = 0
    """nodes verified, roots included, in drafted steps"""
    unmerged_tokens: int = 0
    """rows the same paths would have taken without merging shared prefixes"""
    prefill_seconds: float = 0.0
    """from the prompt's first chunk to its last; steps of other requests run in between"""
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    queue_seconds: float = 0.0
    """until the prompt's first chunk"""
    reused_tokens: int = 0
    """prompt tokens whose keys and values were copied from another request's"""

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

    def count_step(self, config: DecodeConfig, accepted: int, nodes: int, unmerged: int) -> None:
        self.steps += 1
        if config.speculative:
            self.drafted_steps += 1
            self.drafted_tokens += config.deepest
            self.tree_nodes += nodes
            self.unmerged_tokens += unmerged
            depths = self.accepted_at_depth + [0] * (config.deepest - len(self.accepted_at_depth))
            self.accepted_at_depth = [n + (d < accepted) for d, n in enumerate(depths)]

    def to_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        for name in ("tokens_per_step", "tokens_per_second", "acceptance_per_depth", "removed_share"):
            values[name] = getattr(self, name)
        return values


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the target before any setting of the request."""

    logprob: float
    """of the emitted token"""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, best first"""


class StepTree(NamedTuple):
    """The tree that a step verified, as it came from the device: looked into only by those who show it."""

    packed: Sequence[int]
    """``Outcome.trees`` of the row"""
    nodes: int
    agreed: Sequence[int]
    """the drafted tokens that the target agreed to"""

    @property
    def tokens(self) -> list[int]:
        """Node 0 is the root, the last token of the step before; a parent stands before its children."""
        return list(self.packed[: self.nodes])

    @property
    def parent(self) -> list[int]:
        """Index of each node's parent; the root's is 0."""
        size = len(self.packed) // 2
        return list(self.packed[size : size + self.nodes])

    @property
    def path(self) -> list[int]:
        """The root and the nodes of ``agreed``. Siblings have distinct tokens, so there is one such path."""
        tokens, parent, path = self.tokens, self.parent, [0]
        for token in self.agreed:
            path.append(next(i for i in range(1, self.nodes) if parent[i] == path[-1] and tokens[i] == token))
        return path


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
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """of every token, if the request asked"""
    tree: StepTree | None = None
    """of a step that drafted"""


@dataclass(eq=False)
class Request:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    room: int
    """answer tokens at most"""
    salt: str | None
    added: float
    answer_ids: list[int] = field(default_factory=list)
    statistics: RequestStatistics = field(default_factory=RequestStatistics)
    cached: int = 0
    """tokens whose keys and values are known to lie in the request's row"""
    pairs: int = 0
    """(features, next token) pairs known to lie in the drafter's trunk"""
    ended: bool = False
    latest: int = 1
    """tokens of the last step"""

    def likely_ends(self, speculative: bool) -> bool:
        """Whether a step fills the request's room, if it gives as many tokens as the last one did, or as those before
        it on average."""
        expected = max(self.latest, self.statistics.tokens_per_step) if speculative else 1.0
        return len(self.answer_ids) + expected >= self.room

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str | None]:
        """A step's tokens, cut where the request ends, and why it ends."""
        room = self.room - len(self.answer_ids)
        kept: list[int] = []
        reason = None
        for token in tokens:
            if token in self.stop_ids:
                reason = "stop"
                break
            kept.append(token)
            if len(kept) == room:
                reason = "length"
                break
        if not self.answer_ids:
            self.statistics.first_token_seconds, self.statistics._first = self.statistics.seconds, len(kept)
        self.answer_ids.extend(kept)
        self.latest = len(kept)
        self.statistics.answer_tokens = len(self.answer_ids)
        return kept, reason

    def logprobs(self, outcome: Outcome, row: int, count: int) -> tuple[TokenLogprobs, ...] | None:
        """Of the first ``count`` tokens of a step's outcome."""
        if self.params.logprobs is None or outcome.logprobs is None:
            return None
        assert outcome.top_ids is not None and outcome.top_logprobs is not None
        top = self.params.logprobs
        return tuple(
            TokenLogprobs(own, tuple(zip(ids[:top], values[:top], strict=True)))
            for own, ids, values in zip(
                outcome.logprobs[row][:count],
                outcome.top_ids[row][:count],
                outcome.top_logprobs[row][:count],
                strict=True,
            )
        )


def settings_in_use(requests: Sequence[Request]) -> list[bool]:
    """Which settings any of them uses: as long as these stay the same, so do the arrays that a batch needs."""
    return [any(column) for column in zip(*(request.params.used for request in requests), strict=True)]


@dataclass(eq=False)
class Prefill:
    """A prompt on its way into the cache."""

    request: Request
    row: int
    started: float
    features: Array | None = None
    """of the last token read here"""
    read: Callable[[], None] | None = None
    """waits for the end of what was last read of it; None where that has come or a step's outcome would have to wait"""

    @property
    def left(self) -> int:
        """Tokens to be read: the last one of a prompt is the root of its first step."""
        return len(self.request.prompt_ids) - 1 - self.request.cached


@dataclass
class Flight:
    """A step that was launched and whose outcome the host has not read."""

    requests: list[Request]
    config: DecodeConfig
    handle: Any
    launched: float
    alone: bool
    """no prompt was read and no row left just before it or while it ran: its time is a step's"""


class EngineLoad(NamedTuple):
    """A snapshot for metrics."""

    running: int
    waiting: int
    """in the queue, or being prefilled"""
    slots_in_use: int
    """cache slots that hold tokens of running requests"""
    parked_rows: int
    """rows that hold what ended requests left, for reuse"""
    cache_share: float
    """slots in use over slots allocated"""
