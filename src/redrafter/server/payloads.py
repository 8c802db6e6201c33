"""The JSON of answers: whole ones, chunks of streams, usage and acceptance. Field names are OpenAI's and vLLM's."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redrafter import __version__
from redrafter.engine import RequestStatistics
from redrafter.reply import Completion
from redrafter.requests import TokenLogprobs
from redrafter.server.answers import Answers, Part
from redrafter.server.settings import Detail
from redrafter.text import Tokenizer


@dataclass(frozen=True)
class Shape:
    """How one of the two routes writes its answers."""

    chat: bool
    request_id: str
    model: str
    created: int
    names: TokenNames

    @classmethod
    def of(cls, chat: bool, model: str, tokenizer: Tokenizer) -> Shape:
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(chat, request_id, model, int(time.time()), TokenNames(tokenizer))

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"redrafter-{__version__}",
        }

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        if self.chat:
            content: dict[str, Any] = {
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
            }
        else:
            content = {"text": completion.text}
        logprobs = self.logprobs(completion.token_ids, completion.logprobs)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": completion.finish_reason}

    def delta(self, index: int, part: Part | None, reason: str | None = None, *, role: bool = False) -> dict[str, Any]:
        """One choice of a chunk: what a step added, the role that opens an answer, or the reason that ends it."""
        text = "" if part is None else part.chunk.text
        logprobs = None if part is None else self.logprobs(part.chunk.token_ids, part.chunk.logprobs, part.offset)
        end = {"logprobs": logprobs, "finish_reason": reason}
        if not self.chat:
            return {"index": index, "text": text, **end}
        delta = ({"role": "assistant"} if role else {}) | ({"content": text} if role or part is not None else {})
        return {"index": index, "delta": delta, **end}

    def logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, offset: int = 0
    ) -> dict[str, Any] | None:
        """The route's form of them; ``offset``: characters of the answer before these tokens."""
        if logprobs is None:
            return None
        names = self.names
        if self.chat:
            content = [
                {
                    **names.entry(token, own.logprob),
                    "top_logprobs": [names.entry(other, value) for other, value in own.top],
                }
                for token, own in zip(ids, logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        texts = [names.text(token) for token in ids]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(own.logprob) for own in logprobs],
            "top_logprobs": [{names.text(t): _finite(v) for t, v in reversed(own.top)} for own in logprobs],
            "text_offset": [offset + sum(map(len, texts[:i])) for i in range(len(texts))],
        }


class TokenNames:
    """Tokens as log-probabilities show them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", errors="replace")

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for it."""
    return max(logprob, -9999.0)


def usage(answers: Answers) -> dict[str, Any]:
    """Tokens so far; the prompt counts once, whatever the number of answers."""
    answer_tokens = answers.answer_tokens
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": answers.prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.reused_tokens},
    }


def request_metrics(answers: Answers, detail: Detail) -> dict[str, Any] | None:
    """``metrics`` of a finished request with one answer; None if it has several or nobody wants them."""
    completions = answers.completions
    if detail == "none" or len(completions) != 1 or completions[0] is None:
        return None
    stats = completions[0].statistics
    count = len(completions[0].token_ids)
    first, last = answers.first_token[0], answers.last_token[0]
    values: dict[str, Any] = {}
    if first is not None:
        decoding = last - first
        values = {
            "time_to_first_token_ms": 1e3 * (first - answers.arrived),
            "generation_time_ms": 1e3 * (last - answers.arrived),
            "queue_time_ms": 1e3 * stats.queue_seconds,
            "mean_itl_ms": 1e3 * decoding / max(count - 1, 1),
            "tokens_per_second": count / (last - answers.arrived),
        }
    return {**values, "speculative_decoding": speculative_decoding(stats, answers, detail == "detailed")}


def histogram(stats: RequestStatistics) -> list[int]:
    """[d]: drafted steps of which exactly ``d`` drafted tokens were accepted."""
    reached = [stats.drafted_steps, *stats.accepted_at_depth, 0]
    return [here - deeper for here, deeper in itertools.pairwise(reached)]


def speculative_decoding(
    stats: RequestStatistics, answers: Answers | None = None, steps: bool = False
) -> dict[str, Any]:
    """Acceptance of one request; every number but the drafted tokens comes from the one histogram.

    mean_acceptance_length counts the target's own token of each step, so plain decoding has 1.
    """
    counts = histogram(stats)
    total, accepted = sum(counts), sum(d * n for d, n in enumerate(counts))
    length = len(counts) - 1
    values: dict[str, Any] = {
        "mean_acceptance_length": 1 + accepted / total if total else 1.0,
        "draft_acceptance_rate": accepted / stats.drafted_tokens if stats.drafted_tokens else 0.0,
        "acceptance_histogram": counts,
        "num_spec_steps": total,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": stats.drafted_tokens,
        "num_spec_tokens": length,
    }
    if steps and answers is not None:
        values["per_step_accepted"] = answers.accepted
        values["per_step_drafted"] = answers.drafted
    return values


def details(part: Part, names: TokenNames) -> dict[str, Any]:
    """How a chunk came about, for those who look: what was drafted, and what its step verified."""
    tree = part.tree
    return {
        "spans": [[span.text, span.drafted] for span in part.chunk.spans],
        "step": {"accepted": part.accepted, "nodes": part.nodes, "seconds": part.seconds},
        "tree": None
        if tree is None
        else {
            "tokens": [names.text(token) for token in tree.tokens],
            "parent": [-1, *tree.parent[1:]],
            "accepted": tree.path,
        },
    }
