"""A whole decoding step as one CUDA graph: no launch from Python, no wait for the device.

A graph is recorded when a (shape, rows, settings in use) first occurs, and replayed from then on. It reads its state
from buffers of its own and writes the next state into the same buffers, so that steps follow each other without a copy;
a state that comes from elsewhere (a request joined or left) is copied in. Its slow twin is the step it was recorded of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Equal for two nested tuples that one graph can serve: shapes and dtypes of tensors, and all else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return tuple(map(signature, value)) if isinstance(value, tuple) else value


def like(value: Any) -> Any:
    """The same nesting with fresh copies of the tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, tuple):
        return value
    items = map(like, value)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def copy_into(target: Any, source: Any) -> None:
    for to, value in zip(leaves(target), leaves(source), strict=True):
        if to is not value:
            to.copy_(value)


def without_reading(state: DecodeState) -> DecodeState:
    """For a plain step: the drafter does not look, and what waits for it may be of any width."""
    return state._replace(reading=None)  # type: ignore[arg-type]


class Recorded(NamedTuple):
    replay: Callable[[], None]
    state: DecodeState
    """the buffers: read at the start of a replay, the next state after it"""
    after: DecodeState
    """what a caller gets: the buffers, but for the reading of a plain step, which has another width"""
    accepted: Accepted
    tree: TokenTree
    told: Any


class GraphRunner:
    def __init__(self, step: Step, record: Record) -> None:
        self._step, self._record = step, record
        self._graphs: dict[Any, Recorded] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget every graph: something they point to has moved."""
        self._graphs.clear()

    def __call__(self, state: DecodeState, config: DecodeConfig) -> Recorded:
        """One step. What is returned holds until the next call; later work on the same stream sees it whole."""
        if not config.speculative:
            state = without_reading(state)
        key = config, signature(state)
        graph = self._graphs.get(key)
        if graph is None:
            with room_for(f"a graph of a step of {len(state.root)} rows and {config.tree_size} nodes"):
                graph = self._graphs[key] = self._recorded(like(state), config)
        copy_into(graph.state, state)
        graph.replay()
        return graph

    def _recorded(self, buffers: DecodeState, config: DecodeConfig) -> Recorded:
        # Once outside of the recording: libraries set themselves up, kernels compile. It writes to cache slots that
        # the replay writes again, and to nothing else.
        self._step(buffers, config)

        def run() -> tuple[Any, ...]:
            after, accepted, tree, told = self._step(buffers, config)
            copy_into(buffers, after if config.speculative else without_reading(after))
            return after.reading, accepted, tree, told

        replay, (reading, accepted, tree, told) = self._record(run)
        after = buffers if config.speculative else buffers._replace(reading=reading)
        return Recorded(replay, buffers, after, accepted, tree, told)


class CudaRecorder:
    """``Record`` by a CUDA graph. All graphs share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result
