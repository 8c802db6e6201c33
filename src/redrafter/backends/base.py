"""What both backends do alike for the engine: read a prompt in chunks, turn a batch's settings into arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from redrafter.algorithm.accept import Accepted
from redrafter.algorithm.beam import Reading
from redrafter.algorithm.noise import key_of
from redrafter.algorithm.ops import Array
from redrafter.algorithm.sampling import Penalties, Sampling
from redrafter.algorithm.step import DecodeState, step
from redrafter.algorithm.tree import TokenTree
from redrafter.params import DecodeConfig

PREFILL_CHUNK = 256
"""Prompt tokens per forward: enough rows to be compute-bound, little enough memory for the scores."""

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Each penalty and the value that turns it off."""


class BaseBackend:
    """The part of ``engine.Backend`` that is the same text on every framework."""

    ops: Any
    target: Any
    drafter: Any
    run_ahead: bool = False

    def step(self, state: DecodeState, config: DecodeConfig) -> tuple[DecodeState, Accepted, TokenTree]:
        """One decoding step of every row of ``state``; a backend that replays it as a graph overrides this."""
        return step(self.ops, self.target, self.drafter, state, config)

    def array(self, values: Any) -> Array:
        """int64 array of nested lists."""
        raise AssertionError("a backend makes its own arrays")

    def floats(self, values: Any) -> Array:
        """float32 array of nested lists or of a numpy array."""
        raise AssertionError("a backend makes its own arrays")

    def no_features(self) -> Array:
        """[F] zeros in the target's dtype: what precedes a text's first token."""
        raise AssertionError("a backend makes its own arrays")

    def prefill(self, row: int, token_ids: Sequence[int]) -> Array:
        """Read the tokens into an empty row of target and drafter; features [F] of the last, zeros if there is none."""
        ids = self.array(list(token_ids))
        last = self.no_features()
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            end = min(start + PREFILL_CHUNK, len(token_ids))
            features_TF = self.target.prefill(row, ids[start:end], start)
            # The pair of the chunk's last token needs the token after it: it opens the next reading.
            first = max(start - 1, 0)
            if self.drafter is not None and end - 1 > first:
                features = self.ops.concat([last[None], features_TF[:-1]], 0) if start else features_TF[:-1]
                tokens = ids[first + 1 : end]
                reading = Reading(features[None], tokens[None], self.array([first]), self.array([end - 1 - first]))
                self.drafter.read(reading, row)
            last = features_TF[-1]
        return last

    def sampling(self, requests: Sequence[Any]) -> Sampling:
        """Arrays of the requests' SamplingParams (``engine.SamplingHistory``); None where no request uses a field."""
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
