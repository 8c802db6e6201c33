"""From a request's events to its text: chunks while it runs, a completion when it has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redrafter.errors import RedrafterError
from redrafter.params import SamplingParams
from redrafter.text import Detokenizer, Piece, StopMatcher

if TYPE_CHECKING:
    from redrafter.requests import Event, RequestStatistics, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer. ``token_ids`` ends with the token that completed a stop string, ``text`` before the string.

    finish_reason: "stop" (end-of-text token, stop token or stop string), "length" (max_new_tokens or the context is
    used up), "error" (then ``error`` says which, and text and ids are what came before it).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    statistics: RequestStatistics
    error: RedrafterError | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """of every token, if ``SamplingParams.logprobs`` asked"""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What one step added. ``spans`` tell drafted text from the target's own; the last chunk has the completion."""

    spans: tuple[Piece, ...]
    token_ids: tuple[int, ...]
    statistics: RequestStatistics
    completion: Completion | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """of every token, if ``SamplingParams.logprobs`` asked"""

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


class Reply:
    """A request on its way: tokens in, chunks out. ``ended``: the engine no longer knows the request."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        detokenizer: Detokenizer,
    ) -> None:
        self.request_id = request_id
        self.chunks: deque[Chunk] = deque()
        self.completion: Completion | None = None
        self.ended = False
        self._prompt_ids = tuple(prompt_ids)
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(params.stop)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []

    def push(self, event: Event) -> None:
        self.ended = event.finish_reason is not None
        pieces: list[Piece] = []
        taken = 0
        while taken < len(event.tokens) and self._matcher.matched is None:
            text = self._detokenizer.push(event.tokens[taken])
            pieces += self._matcher.push(Piece(text, taken < event.drafted))
            taken += 1
        if event.finish_reason is not None and self._matcher.matched is None:
            pieces += self._matcher.push(Piece(self._detokenizer.flush(), False))
            pieces += self._matcher.flush()
        self._token_ids += event.tokens[:taken]
        logprobs = None if event.logprobs is None else event.logprobs[:taken]
        if self._logprobs is not None:
            self._logprobs += logprobs or ()
        self._text += [piece.text for piece in pieces]
        reason = "stop" if self._matcher.matched is not None else event.finish_reason
        if reason is not None:
            self.completion = Completion(
                text="".join(self._text),
                token_ids=tuple(self._token_ids),
                prompt_token_ids=self._prompt_ids,
                finish_reason=reason,
                statistics=event.statistics,
                error=event.error if reason == "error" else None,
                logprobs=None if self._logprobs is None else tuple(self._logprobs),
            )
        self.chunks.append(
            Chunk(
                spans=tuple(pieces),
                token_ids=tuple(event.tokens[:taken]),
                statistics=event.statistics,
                completion=self.completion,
                logprobs=logprobs,
            )
        )
