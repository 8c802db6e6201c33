"""What a caller may ask for: frozen, keyword-only dataclasses. Unknown keys and impossible values raise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from redrafter.errors import InvalidRequest

T = TypeVar("T")

MAX_BEAMS = 256
MAX_TREE = 512
MAX_DRAFT_LENGTH = 32
MAX_LOGPROBS = 20


def _check(ok: bool, name: str, value: object, limit: str, fix: str) -> None:
    if not ok:
        raise InvalidRequest(f"{name}={value!r} is not allowed: it must be {limit}; {fix}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a params dataclass from a mapping; a key it does not know raises InvalidRequest naming the known ones."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise InvalidRequest(f"{key!r} is not a setting of {cls.__name__}: use one of {', '.join(sorted(known))}")
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the target chooses its tokens, and when it stops. The output is a function of these and the prompt only.

    temperature 0 is greedy. ``seed`` (64-bit) keys the noise together with the position and the token id, so the
    same seed gives the same text with or without speculation; ``answer_index`` (32-bit) tells apart several answers
    asked for with one seed. top_k 0, top_p 1 and min_p 0 are off.
    repetition_penalty counts prompt and answer, presence and frequency penalties the answer only. ``logprobs``: tell
    the target's log-probability of every token, and of so many of the most likely ones; None turns it off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    answer_index: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        t = self.temperature
        _check(_finite(t) and 0.0 <= t <= 100.0, "temperature", t, "from 0 to 100", "0 is greedy")
        _check(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", self.top_k, "0 or more", "0 turns it off")
        _check(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "over 0, at most 1", "1 turns it off")
        _check(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1", "0 turns it off")
        r = self.repetition_penalty
        _check(_finite(r) and r > 0, "repetition_penalty", r, "over 0", "1 turns it off")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_finite(value) and abs(value) <= 100, name, value, "from -100 to 100", "0 turns it off")
        _check(
            isinstance(self.seed, int) and 0 <= self.seed < 2**64, "seed", self.seed, "in [0, 2**64)", "pick another"
        )
        i = self.answer_index
        _check(isinstance(i, int) and 0 <= i < 2**32, "answer_index", i, "in [0, 2**32)", "count answers from 0")
        m = self.max_new_tokens
        _check(isinstance(m, int) and m >= 1, "max_new_tokens", m, "1 or more", "ask for at least one token")
        k = self.logprobs
        ok = k is None or (isinstance(k, int) and not isinstance(k, bool) and 0 <= k <= MAX_LOGPROBS)
        _check(ok, "logprobs", k, f"a whole number from 0 to {MAX_LOGPROBS}", "None turns it off")
        for text in self.stop:
            _check(isinstance(text, str) and text != "", "stop", text, "a non-empty string", "leave it out instead")
        for token, bias in self.logit_bias.items():
            ok = isinstance(token, int) and token >= 0 and isinstance(bias, int | float) and not math.isnan(bias)
            _check(
                ok and bias < math.inf,
                "logit_bias",
                {token: bias},
                "token id -> finite number or -inf",
                "fix the entry",
            )

    @cached_property
    def used(self) -> tuple[bool, ...]:
        """Of every setting that shapes the choice, and of logprobs: whether it is not off."""
        cuts = self.top_k > 0, self.top_p < 1, self.min_p > 0
        penalties = self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0
        return self.temperature > 0, *cuts, any(penalties), bool(self.logit_bias), self.logprobs is not None


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The beam shape: how much to draft and how much of it to verify. It changes the speed and never the output.

    beam_width: beams kept per depth; branching: children scored per beam; draft_length: drafted tokens per beam (the
    root is not counted); tree_size: nodes verified per step (the root is counted, so 1 is plain decoding).
    prompt_lookup: what followed when the text last ended as it does now is drafted, too, up to this depth, also below
    the beams; 0 leaves drafting to the drafter alone.
    """

    beam_width: int = 8
    branching: int = 8
    draft_length: int = 8
    tree_size: int = 64
    seed_coupled: bool = True
    prompt_lookup: int = 15

    def __post_init__(self) -> None:
        for name, most in (
            ("beam_width", MAX_BEAMS),
            ("branching", MAX_BEAMS),
            ("draft_length", MAX_DRAFT_LENGTH),
            ("tree_size", MAX_TREE),
        ):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
            _check(ok, name, value, f"a whole number from 1 to {most}", "see `redrafter generate --help`")
        value = self.prompt_lookup
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DRAFT_LENGTH
        _check(ok, "prompt_lookup", value, f"a whole number from 0 to {MAX_DRAFT_LENGTH}", "0 turns it off")

    @property
    def deepest(self) -> int:
        """The most drafted tokens that a step may accept."""
        return max(self.draft_length, min(self.prompt_lookup, self.tree_size - 1))

    @property
    def speculative(self) -> bool:
        return self.tree_size > 1


PLAIN = DecodeConfig(beam_width=1, branching=1, draft_length=1, tree_size=1, prompt_lookup=0)
"""Plain decoding through the same code: a tree that is only its root."""
