"""What an engine needs of a backend beside the algorithm's own protocols; one object owns target, drafter, caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.ops import Array
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.algorithm.tree import TokenTree
from redrafter.params import DecodeConfig, SamplingParams


class SamplingHistory(NamedTuple):
    params: SamplingParams
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


class Outcome(NamedTuple):
    """A step's outcome on the host, a list entry per row."""

    tokens: list[list[int]]
    """deepest + 1 each: the accepted ones, then the bonus, which repeats to the end"""
    accepted: list[int]
    """drafted tokens accepted; the bonus comes on top"""
    finite: list[bool]
    nodes: list[int]
    """tree nodes verified, the root included"""
    unmerged: list[int]
    """rows the same paths would have taken without merging shared prefixes"""
    trees: list[list[int]]
    """the tokens of all nodes, then their parents; the first ``nodes`` of either are live"""
    logprobs: list[list[float]] | None
    """of every token in ``tokens``; None when no request asked"""
    top_ids: list[list[list[int]]] | None
    top_logprobs: list[list[list[float]]] | None


class HeldRow(NamedTuple):
    """A cache row that no request runs in, and what may be taken from it."""

    ids: tuple[int, ...]
    """the text; the first ``tokens`` of it have their keys and values in the target's cache"""
    tokens: int
    pairs: int
    """of the text's (features, next token) pairs, so many from the first on are in the drafter's trunk"""
    salt: str | None
    """only requests of the same salt may use it"""
    ended: float
    """when it was left (``time.perf_counter``)"""


class PromptPart(NamedTuple):
    """A text of which a row holds the first ``start`` tokens: the next ones are to be read."""

    row: int
    token_ids: Sequence[int]
    start: int
    before: Array | None
    """features [F] of token start - 1, None where the drafter has its pair"""


class Backend(Protocol):
    ops: Any
    target: Any
    """an algorithm.step.Target"""
    drafter: Any
    """an algorithm.beam.Drafter, or None"""
    context_limit: int
    eos_ids: frozenset[int]
    run_ahead: bool
    """the engine launches a step before it reads the one before, so that the device never waits for the host"""

    reads_together: bool
    """reading several prompts at once takes less time than one after the other"""

    @property
    def prompt_chunk(self) -> int:
        """Tokens of a prompt that are read at once."""

    @property
    def held(self) -> dict[int, HeldRow]:
        """Cache row -> what an ended request left in it. Rows that are not named hold nothing of use."""

    @property
    def graphs(self) -> int | None:
        """Steps recorded so far, one per (shape, about so many rows, settings in use), each of which took a good part
        of a second; None where steps are not recorded."""

    @property
    def rows(self) -> int:
        """Cache rows allocated."""

    @property
    def slots(self) -> int:
        """Cache slots (tokens) allocated per row."""

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        """One decoding step (``algorithm.step.step``) of every row of ``state``, which are the cache's first rows. If
        it speculates, ``state.reading`` is deepest + 1 pairs wide."""

    def keep_rows(self, state: DecodeState, order: Sequence[int]) -> DecodeState | None:
        """Make row i what row ``order[i]`` was, in place; the others go, and ``state`` may not be used afterwards. None
        if nothing was done: the caller takes the rows."""

    def fetch(self, accepted: Accepted, tree: TokenTree) -> Any:
        """Start to bring a step's outcome to the host; returns at once. What it returns is for ``read``."""

    def read(self, handle: Any) -> Outcome:
        """Wait for what ``fetch`` started."""

    def prepare(self, max_batch: int, shapes: Sequence[DecodeConfig]) -> None:
        """Do before the first request what would keep it waiting; ``shapes``: all that steps may take."""

    def catch_up(self, reading: Reading) -> None:
        """Let the drafter read pairs ahead of its next step, rows 0 onward."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Cache room for so many rows of so many tokens each; raises OutOfMemory."""

    def prefill(self, row: int, token_ids: Sequence[int]) -> Array:
        """Read the tokens into an empty row of target and drafter; features [F] of the last, zeros if there is none."""

    def prefill_chunks(self, parts: Sequence[PromptPart]) -> list[tuple[Array, int]]:
        """Read the next ``prompt_chunk`` tokens of texts in different rows, or what they have: of each, features [F] of
        the last token read, and how many are in its row now."""

    def copy_prefix(self, source: int, to: int, tokens: int) -> None:
        """The first ``tokens`` slots of row ``to`` become those of row ``source``, in every cache."""

    def swap_rows(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first ``tokens`` slots of two rows, in every cache."""

    def sampling(self, requests: Sequence[SamplingHistory]) -> Sampling:
        """The batch's settings as arrays; a field that no request uses is None."""

    def ends(self, stop_ids: Collection[int], full: int) -> Any:
        """For ``DecodeState.ends``, a tuple of arrays of one row, whose answer ends with any of these tokens or with
        ``full`` tokens in the cache; None where steps do not look for that. The host looks in any case."""

    def no_features(self) -> Array:
        """[F] zeros in the target's dtype: what precedes a text's first token."""

    def array(self, values: Any) -> Array:
        """int64 array of nested lists."""

    def host(self, array: Array) -> Any:
        """Nested lists of an array."""

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards means something."""

    def mark(self) -> Callable[[], None] | None:
        """What waits for all that the device was given so far, not for what it is given later; None: that is done."""
