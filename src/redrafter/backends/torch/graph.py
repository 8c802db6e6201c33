"""A whole decoding step as one CUDA graph: no launch from Python, no wait for the device.

A graph is recorded when a (shape, rows, settings in use) first occurs, for one of a few sizes (``size_for``), and
replayed from then on, also for a few rows less: the rest are idle then (``IDLE``). It reads its state from buffers of
its own and writes the next state into the same buffers, so that steps follow each other without a copy; a state that
comes from elsewhere (a request joined or left) is copied in. Its slow twin is the step it was recorded of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.step import DecodeState
from redrafter.algorithm.tree import TokenTree
from redrafter.backends.torch.gpu import room_for
from redrafter.params import DecodeConfig

Step = Callable[[DecodeState, DecodeConfig], tuple[DecodeState, Accepted, TokenTree, Any]]
"""The step to record; the last item is whatever the host is to be told, in tensors."""
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a function: what replays it, and the nested tuples of tensors that every replay writes its result into."""


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item)


def signature(value: Any) -> Any:
    """Equal for two nested tuples that one graph can serve but for the number of rows, the first axis of every tensor:
    other axes and dtypes of tensors, and all else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]), value.dtype
    return tuple(map(signature, value)) if isinstance(value, tuple) else value


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with the function's tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, tuple):
        return value
    items = (mapped(function, item) for item in value)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def without_reading(state: DecodeState) -> DecodeState:
    """For a plain step: the drafter does not look, and what waits for it may be of any width."""
    return state._replace(reading=None)  # type: ignore[arg-type]


def copy_into(target: Any, source: Any) -> None:
    """With few launches, however many tensors there are."""
    pairs = [(to, value) for to, value in zip(leaves(target), leaves(source), strict=True) if to is not value]
    if pairs and pairs[0][0].is_cuda:
        from redrafter.backends.torch.kernels.copies import copied_together, copy_together  # needs triton

        together = [pair for pair in pairs if copied_together(*pair)]
        pairs = [pair for pair in pairs if not copied_together(*pair)]
        copy_together(together)
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [value for _, value in pairs])


IDLE = -2
"""The length of a row that no request runs in, before and after a step: its keys and values go behind all texts, its
outcome to nobody. (A row whose text is one token has length 0, and its reading begins at -1.)"""

STOPS = 8
"""Tokens that end an answer which a step looks for; the host knows them all."""


class Ends(NamedTuple):
    """Where a row's answer ends. The row is idle from then on: in the step that was launched before the host knew, it
    reads no text and writes behind all."""

    tokens: Tensor  # [B, STOPS] int64; -1: none
    full: Tensor  # [B] int64 tokens in the cache when the answer is as long as it may become


def size_for(rows: int, most: int) -> int:
    """The rows that a graph is recorded for: the next of 1, 2, 4, 6, 8, 12, 16, 24, 32, .. and at most ``most``."""
    power = 1 << (rows - 1).bit_length()
    between = 3 * power // 4
    return min(between if power > 4 and rows <= between else power, max(rows, most))


def serves(size: int, rows: int) -> bool:
    """Idle rows cost less than recording again each time that a request leaves, while they are a few."""
    return size == rows or rows < size < 1.5 * rows


def idle_from(state: DecodeState, rows: int) -> None:
    """No request runs in the rows from this one on."""
    state.lengths[rows:] = IDLE
    if state.reading is not None:
        state.reading.first[rows:] = IDLE


def padded(state: DecodeState, size: int) -> DecodeState:
    """A copy with so many rows; those that are new are idle, and else like the first."""
    rows = state.root.shape[0]
    state = mapped(lambda x: torch.cat([x, x[:1].expand(size - rows, *x.shape[1:])]), state)
    idle_from(state, rows)
    return state


class View(NamedTuple):
    """The first rows of a graph: the same tensor objects at every step, so that nothing is copied needlessly."""

    state: DecodeState
    """the buffers: read at the start of a replay, the next state after it"""
    after: DecodeState
    """what a caller gets: the buffers, but for the reading of a plain step, which has another width"""
    accepted: Accepted
    tree: TokenTree
    told: Any


class Recorded:
    """A graph, its buffers and its results. The first ``rows`` of its rows are in use, the others are idle now."""

    def __init__(self, replay: Callable[[], None], whole: View, rows: int) -> None:
        self.replay = replay
        self._whole = whole
        self._views: dict[int, View] = {whole.state.root.shape[0]: whole}
        self._now = rows

    def first(self, rows: int) -> View:
        if rows not in self._views:
            parts: dict[int, Tensor] = {}  # one for every tensor: what leaves as ``after`` comes back as ``state``
            self._views[rows] = mapped(lambda x: parts.setdefault(id(x), x[:rows]), self._whole)
        return self._views[rows]

    def load(self, state: DecodeState) -> View:
        rows = state.root.shape[0]
        view = self.first(rows)
        copy_into(view.state, state)
        if rows != self._now:
            self._now = rows
            idle_from(self._whole.state, rows)
        return view


class GraphRunner:
    """``most``: the rows that the caches have now."""

    def __init__(self, step: Step, record: Record, most: Callable[[], int]) -> None:
        self._step, self._record, self._most = step, record, most
        self._graphs: dict[Any, dict[int, Recorded]] = {}
        self._last: tuple[Recorded, DecodeState] | None = None
        """the graph that ran last, and what it left"""

    def __len__(self) -> int:
        return sum(map(len, self._graphs.values()))

    def clear(self) -> None:
        """Forget every graph: something they point to has moved."""
        self._graphs.clear()
        self._last = None

    def __call__(self, state: DecodeState, config: DecodeConfig) -> View:
        """One step. What is returned holds until the next call; later work on the same stream sees it whole."""
        if not config.speculative:
            state = without_reading(state)
        rows = state.root.shape[0]
        known = self._graphs.setdefault((config, signature(state)), {})
        size = min((size for size in known if serves(size, rows)), default=None)
        if size is None:
            size = size_for(rows, self._most())
            with room_for(f"a graph of a step of {size} rows and {config.tree_size} nodes"):
                known[size] = self._recorded(padded(state, size), config, rows)
        graph = known[size]
        view = graph.load(state)
        graph.replay()
        self._last = graph, view.after
        return view

    def keep(self, state: DecodeState, order: Sequence[int]) -> DecodeState | None:
        """``Backend.keep_rows`` within the buffers of the graph that ran last; None for what does not lie there. Rows
        that move may come from behind those that are kept only."""
        moves = [(to, source) for to, source in enumerate(order) if to != source]
        if self._last is None or any(source < len(order) for _, source in moves):
            return None
        graph, after = self._last
        tensors = list(leaves(after))
        if [id(x) for x in leaves(state)] != [id(x) for x in tensors]:
            return None
        if moves:
            torch._foreach_copy_(
                [x[to] for to, _ in moves for x in tensors], [x[of] for _, of in moves for x in tensors]
            )
        return graph.first(len(order)).after

    def _recorded(self, buffers: DecodeState, config: DecodeConfig, rows: int) -> Recorded:
        # Once outside of the recording: libraries set themselves up, kernels compile. It writes to cache slots that
        # the replay writes again, and to nothing else.
        self._step(buffers, config)

        def run() -> tuple[Any, ...]:
            after, accepted, tree, told = self._step(buffers, config)
            copy_into(buffers, after if config.speculative else without_reading(after))
            return after.reading, accepted, tree, told

        replay, (reading, accepted, tree, told) = self._record(run)
        after = buffers if config.speculative else buffers._replace(reading=reading)
        return Recorded(replay, View(buffers, after, accepted, tree, told), rows)


class CudaRecorder:
    """``Record`` by a CUDA graph. All graphs share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: Any = None
        """a graph that is never forgotten: the pool ends with its last graph"""

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self._keeper is None:
            self._keeper = self._captured(lambda: torch.zeros(1, device=self._device))
        graph, result = self._captured(function)
        return graph.replay, result

    def _captured(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph, result
