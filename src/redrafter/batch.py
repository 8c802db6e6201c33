"""Rows of a decode state: one more, fewer, and readings of different widths beside and after one another."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from redrafter.algorithm.beam import Reading
from redrafter.algorithm.ops import Array
from redrafter.algorithm.sampling import Sampling
from redrafter.algorithm.step import DecodeState
from redrafter.backends.protocol import Backend
from redrafter.params import DecodeConfig

MAX_PENDING = 64
"""Pairs that wait for the drafter while plain steps are taken; it then reads them at once."""
NEVER = 2**62
"""More tokens than any cache holds."""


def first_state(
    backend: Backend,
    config: DecodeConfig,
    features_F: Array,
    root: int,
    length: int,
    stop_ids: Collection[int] = (),
    full: int = NEVER,
) -> DecodeState:
    """One row whose ``length`` tokens lie in the cache and whose next token, the root, does not. It ends with any of
    ``stop_ids``, or with ``full`` tokens in the cache."""
    one = backend.array([[0] * (config.deepest + 1 if config.speculative else 1)])
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
        ends=backend.ends(stop_ids, full),
    )


def join(ops: Any, a: DecodeState, b: DecodeState) -> DecodeState:
    """The rows of ``a``, then those of ``b``; the sampling settings are rebuilt by the caller."""
    width = max(a.reading.tokens.shape[1], b.reading.tokens.shape[1])
    return DecodeState(
        reading=_stacked(ops, pad(ops, a.reading, width), pad(ops, b.reading, width)),
        root=_stacked(ops, a.root, b.root),
        lengths=_stacked(ops, a.lengths, b.lengths),
        sampling=a.sampling,
        ends=_stacked(ops, a.ends, b.ends),
    )


def _stacked(ops: Any, a: Any, b: Any) -> Any:
    """The rows of a part of one state, then those of another's."""
    if isinstance(a, tuple):
        return type(a)(*(_stacked(ops, x, y) for x, y in zip(a, b, strict=True)))
    return None if a is None else ops.concat([a, b], 0)


def take_rows(state: Any, index: Array) -> Any:
    """These rows in this order, of a state or of any part of one."""
    if state is None or isinstance(state, bool):
        return state
    return type(state)(*(take_rows(x, index) for x in state)) if isinstance(state, tuple) else state[index]


def pad(ops: Any, reading: Reading, width: int) -> Reading:
    """At least ``width`` pairs wide: the last one, which is a row's last or a copy of it, is repeated."""
    more = width - reading.tokens.shape[1]
    if more <= 0:
        return reading
    features, tokens = reading.features, reading.tokens
    return reading._replace(
        features=ops.concat([features, *[features[:, -1:]] * more], 1),
        tokens=ops.concat([tokens, *[tokens[:, -1:]] * more], 1),
    )


def append(ops: Any, old: Reading, new: Reading) -> Reading:
    """The pairs of ``old``, then those of ``new``: what a drafter that did not look at ``old`` has to read."""
    before, width = old.tokens.shape[1], old.tokens.shape[1] + new.tokens.shape[1]
    place_BT = ops.arange(width, like=new.tokens)[None, :] + 0 * new.tokens[:, :1]
    late_BT = place_BT - old.count[:, None]
    last_BT = (new.count - 1)[:, None] + 0 * place_BT
    late_BT = ops.where(late_BT < last_BT, late_BT, last_BT) + before
    index_BT = ops.where(place_BT < old.count[:, None], place_BT, late_BT)
    row_B1 = ops.arange(new.tokens.shape[0], like=new.tokens)[:, None]
    return Reading(
        features=ops.concat([old.features, new.features], 1)[row_B1, index_BT],
        tokens=ops.concat([old.tokens, new.tokens], 1)[row_B1, index_BT],
        first=old.first,
        count=old.count + new.count,
    )


def last_pair(ops: Any, reading: Reading) -> Reading:
    """The root's pair alone: enough for a drafter that has read the others."""
    row_B1 = ops.arange(reading.tokens.shape[0], like=reading.tokens)[:, None]
    last_B1 = (reading.count - 1)[:, None]
    return Reading(
        features=reading.features[row_B1, last_B1],
        tokens=reading.tokens[row_B1, last_B1],
        first=reading.first + reading.count - 1,
        count=reading.count * 0 + 1,
    )


def of_width(backend: Backend, reading: Reading, width: int) -> Reading:
    """For a step whose drafter reads exactly ``width`` pairs: a wider reading is read beforehand."""
    if reading.tokens.shape[1] > width:
        backend.catch_up(reading)
        reading = last_pair(backend.ops, reading)
    return pad(backend.ops, reading, width)
