"""What both backends do alike for the engine: read a prompt in chunks, turn a batch's settings into arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.noise import key_of
from redrafter.algorithm.ops import Array
from redrafter.algorithm.sampling import Penalties, Sampling
from redrafter.algorithm.step import STAGES, DecodeState, Stages, step
from redrafter.algorithm.tree import TokenTree, unmerged_tokens
from redrafter.backends.protocol import HeldRow, Outcome, PromptPart, SamplingHistory
from redrafter.params import MAX_LOGPROBS, DecodeConfig

PREFILL_CHUNK = 256
"""Prompt tokens per forward: enough rows to be compute-bound, little enough memory for the scores."""

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Each penalty and the value that turns it off."""


class Fetched(NamedTuple):
    """A step's outcome on its way to the host."""

    packed: Array
    """[B, deepest + 5] int64: tokens | accepted | finite | nodes | unmerged"""
    logprobs: tuple[Array, Array, Array] | None
    """of the tokens [B, L+1], and the most likely ones [B, L+1, MAX_LOGPROBS]: their ids and theirs"""
    ready: Any = None
    """what to wait for before reading; None: nothing"""


class BaseBackend:
    """The part of ``protocol.Backend`` that is the same text on every framework."""

    ops: Any
    target: Any
    drafter: Any
    run_ahead: bool = False
    reads_together: bool = False
    stages: Stages = STAGES
    """how the parts of a step are done; to be changed inside ``recorded_anew`` only"""

    @cached_property
    def held(self) -> dict[int, HeldRow]:
        """What ended requests left in the rows: it belongs to the caches, whichever engine uses them."""
        return {}

    @property
    def prompt_chunk(self) -> int:
        return PREFILL_CHUNK

    @property
    def graphs(self) -> int | None:
        """None: steps are not recorded."""
        return None

    @property
    def rows(self) -> int:
        return self.target.cache.rows

    @property
    def slots(self) -> int:
        return self.target.cache.slots

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        """One decoding step of every row of ``state``; a backend that replays it as a graph overrides this."""
        return step(self.ops, self.target, self.drafter, state, config, self.stages)

    def keep_rows(self, state: DecodeState, order: Sequence[int]) -> DecodeState | None:
        """None: nothing lies in buffers of its own."""
        return None

    def ends(self, stop_ids: Collection[int], full: int) -> Any:
        """None: the host looks before the next step."""
        return None

    def prepare(self, max_batch: int, shapes: Sequence[DecodeConfig]) -> None:
        """Do before the first request what would keep it waiting; ``shapes``: all that steps may take. Here caches grow
        with use."""

    @contextmanager
    def recorded_anew(self) -> Iterator[None]:
        """Inside, nothing was recorded yet; afterwards what was recorded before is there again. Only while no request
        runs."""
        yield

    def fetch(self, accepted: Accepted, tree: TokenTree) -> Fetched:
        """One array for one transfer."""
        ops = self.ops
        rows, width = accepted.tokens.shape
        one = ops.full((rows,), 1, like=accepted.tokens)
        sizes = (one, one) if tree.tokens.shape[1] == 1 else (ops.sum(tree.live), unmerged_tokens(ops, tree))
        columns = (accepted.length, ops.sum(accepted.finite[:, None]), *sizes)
        numbers = [*(column[:, None] for column in columns), ops.full((rows, 1), width, like=accepted.tokens)]
        packed = ops.concat([accepted.tokens, tree.tokens, tree.parent, *numbers], 1)
        return Fetched(packed, None if accepted.logits is None else self._logprobs(accepted.logits, accepted.tokens))

    def _logprobs(self, logits_BLV: Array, tokens_BL: Array) -> tuple[Array, Array, Array]:
        """Before any setting of the request: what the model itself thinks."""
        total = self.ops.logsumexp(logits_BLV)
        best, ids = self.ops.top_k(logits_BLV, min(MAX_LOGPROBS, logits_BLV.shape[-1]))
        own = self.ops.take_along(logits_BLV, tokens_BL[:, :, None], 2)
        return (own - total)[:, :, 0], ids, best - total

    def read(self, handle: Fetched) -> Outcome:
        rows = self.host(handle.packed)
        accepted, finite, nodes, unmerged, width = ([row[i] for row in rows] for i in (-5, -4, -3, -2, -1))
        tokens = [row[:w] for row, w in zip(rows, width, strict=True)]
        trees = [row[w:-5] for row, w in zip(rows, width, strict=True)]
        logprobs = (None, None, None) if handle.logprobs is None else tuple(map(self.host, handle.logprobs))
        return Outcome(tokens, accepted, [bool(x) for x in finite], nodes, unmerged, trees, *logprobs)

    def catch_up(self, reading: Reading) -> None:
        self.drafter.read(reading, 0)

    def array(self, values: Any) -> Array:
        """int64 array of nested lists."""
        raise AssertionError("a backend makes its own arrays")

    def synchronize(self) -> None:
        """Wait for the device; without a queue there is nothing to wait for."""

    def mark(self) -> Callable[[], None] | None:
        """Waits here and now: what is lazily computed would be computed with what comes after it."""
        self.synchronize()
        return None

    def floats(self, values: Any) -> Array:
        """float32 array of nested lists or of a numpy array."""
        raise AssertionError("a backend makes its own arrays")

    def host(self, array: Array) -> Any:
        """Nested lists of an array."""
        raise AssertionError("a backend reads its own arrays")

    def no_features(self) -> Array:
        """[F] zeros in the target's dtype: what precedes a text's first token."""
        raise AssertionError("a backend makes its own arrays")

    def prefill(self, row: int, token_ids: Sequence[int]) -> Array:
        """Read the tokens into an empty row of target and drafter; features [F] of the last, zeros if there is none."""
        self.held.pop(row, None)
        last, done = None, 0
        while done < len(token_ids):
            [(last, done)] = self.prefill_chunks([PromptPart(row, token_ids, done, last)])
        return self.no_features() if last is None else last

    def prefill_chunks(self, parts: Sequence[PromptPart]) -> list[tuple[Array, int]]:
        return [self.prefill_chunk(*part) for part in parts]

    def prefill_chunk(self, row: int, token_ids: Sequence[int], start: int, before: Array | None) -> tuple[Array, int]:
        end = min(start + PREFILL_CHUNK, len(token_ids))
        pads = [0] * self.prompt_pads(start, end - start)
        ids = self.array([*token_ids[start:end], *pads])
        features_TF = self.target.prefill(row, ids, start)
        # The pair of the chunk's last token needs the token after it: it opens the next reading.
        first = start if before is None else start - 1
        if self.drafter is not None and end - 1 > first:
            features = features_TF[:-1]
            if before is None:
                ids = ids[1:]
            else:
                features = self.ops.concat([before[None], features], 0)
            reading = Reading(features[None], ids[None], self.array([first]), self.array([end - 1 - first]))
            self.drafter.read(reading, row)
        return features_TF[end - start - 1], end

    def prompt_pads(self, start: int, count: int) -> int:
        """Tokens to add to the ``count`` that are read from ``start`` on, where a backend wants few different shapes.
        What they leave in the caches lies behind the text and is overwritten before anything looks there."""
        return 0

    def sampling(self, requests: Sequence[SamplingHistory]) -> Sampling:
        """Arrays of the requests' settings; None where no request uses a field."""
        params = [r.params for r in requests]
        vocab = self.target.vocab_size
        inverse = self._column([1 / p.temperature if p.temperature > 0 else 0.0 for p in params], 0.0)
        top_k = [min(p.top_k or vocab, vocab) for p in params]
        # A greedy row's temperature is 1 in the cuts below, which never remove its largest score.
        return Sampling(
            inverse_temperature=inverse,
            key=None if inverse is None else self.array([key_of(p.seed, p.answer_index) for p in params]),
            top_k=None if all(k == vocab for k in top_k) else self.array(top_k),
            top_p=self._column([p.top_p for p in params], 1.0),
            log_min_p=self._column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], -math.inf),
            bias=self._bias(params),
            penalties=self._penalties(requests),
            keep_logits=any(p.logprobs is not None for p in params),
        )

    def _column(self, values: list[float], off: float) -> Array | None:
        return None if all(v == off for v in values) else self.floats(values)

    def _bias(self, params: Sequence[Any]) -> Array | None:
        if not any(p.logit_bias for p in params):
            return None
        bias = np.zeros((len(params), self.target.vocab_size), dtype=np.float32)
        for row, p in enumerate(params):
            for token, value in p.logit_bias.items():
                bias[row, token] = value
        return self.floats(bias)

    def _penalties(self, requests: Sequence[Any]) -> Penalties | None:
        values = {name: [getattr(r.params, name) for r in requests] for name in PENALTIES}
        if all(v == off for name, off in PENALTIES.items() for v in values[name]):
            return None

        def counts(name: str) -> Array:
            ids = [np.asarray(getattr(r, name), dtype=np.int64) for r in requests]
            return self.floats(np.stack([np.bincount(x, minlength=self.target.vocab_size) for x in ids]))

        repetition, presence, frequency = (self.floats(values[name]) for name in PENALTIES)
        return Penalties(repetition, presence, frequency, counts("prompt_ids"), counts("answer_ids"))
