"""``redrafter generate --compare``: plain and speculative decoding, interleaved, on one engine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from redrafter.bench.metrics import first_fork
from redrafter.errors import InvalidRequest
from redrafter.params import SamplingParams

if TYPE_CHECKING:
    from redrafter.llm import LLM, Completion, Prompt

WARM_UP_TOKENS = 8


def compare(
    llm: LLM,
    prompt: Prompt,
    params: SamplingParams,
    *,
    raw: bool,
    repeat: int,
    allow_forks: bool,
    as_json: bool,
) -> int:
    """Print whether the ids are equal and what the medians of ``repeat`` runs say; returns the exit code."""
    if not llm.engine.speculative:
        if llm.drafter is None:
            raise InvalidRequest("--compare needs a drafter and there is none for this model: name one with --drafter")
        raise InvalidRequest(
            "--compare: plain decoding was the fastest beam shape here, so there is nothing to compare: give one, "
            "for instance --tree-size 8 --draft-length 3"
        )

    def run(speculation: bool, settings: SamplingParams = params) -> Completion:
        return llm.generate(prompt, settings, raw=raw, speculation=speculation)[0]

    llm.reuse_prefixes(False)  # the second way would skip the prompt that the first has read
    warm_up = replace(params, max_new_tokens=min(WARM_UP_TOKENS, params.max_new_tokens))
    run(False, warm_up), run(True, warm_up)
    plain: list[Completion] = []
    drafted: list[Completion] = []
    for number in range(repeat):
        # Alternate which way goes first, so that a machine that slows down slows both.
        for speculation in (False, True) if number % 2 == 0 else (True, False):
            (drafted if speculation else plain).append(run(speculation))
    result = summary(llm, plain, drafted)
    print(json.dumps(result, allow_nan=False) if as_json else "\n".join(_lines(result)))
    forgiven = allow_forks and llm.dtype != "float32"
    return 0 if result["equal"] or forgiven else 1


def summary(llm: LLM, plain: Sequence[Completion], drafted: Sequence[Completion]) -> dict[str, Any]:
    """Every run of either way is held against the first plain one."""
    reference = plain[0].token_ids
    runs = [(run, "two plain runs") for run in plain] + [(run, "plain and speculative") for run in drafted]
    forks = [
        (at, run.token_ids, between)
        for run, between in runs
        if (at := first_fork(reference, run.token_ids)) is not None
    ]
    fork = None
    if forks:
        at, ids, between = min(forks, key=lambda found: found[0])
        fork = {
            "position": at,
            "plain": _token(llm, reference, at),
            "speculative": _token(llm, ids, at),
            "between": between,
            "logit_gap": _gap(llm, plain[0], ids, at),
        }
    rates = [statistics.median(r.statistics.tokens_per_second for r in way) for way in (plain, drafted)]
    return {
        "equal": fork is None,
        "tokens": len(reference),
        "fork": fork,
        "plain_tokens_per_second": rates[0],
        "speculative_tokens_per_second": rates[1],
        "speedup": rates[1] / rates[0] if rates[0] > 0 else None,
        "tokens_per_step": statistics.median(r.statistics.tokens_per_step for r in drafted),
        "repeat": len(plain),
        "model": llm.model,
        "drafter": llm.drafter,
        "dtype": llm.dtype,
        "text": plain[0].text,
    }


def _gap(llm: LLM, plain: Completion, ids: Sequence[int], at: int) -> float | None:
    """How far apart a pass over one row puts the two tokens; None where one of the answers had ended."""
    if at >= min(len(plain.token_ids), len(ids)):
        return None
    logits = llm.next_logits([*plain.prompt_token_ids, *plain.token_ids[:at]])
    return logits[plain.token_ids[at]] - logits[ids[at]]


def _token(llm: LLM, ids: Sequence[int], at: int) -> dict[str, Any] | None:
    """The token at a position; None where the answer had ended."""
    return {"id": ids[at], "text": llm.tokenizer.decode([ids[at]])} if at < len(ids) else None


def _lines(result: dict[str, Any]) -> list[str]:
    fork = result["fork"]
    if fork is None:
        equal = f"equal ids: yes ({result['tokens']} tokens)"
    else:
        sides = [
            f"{name} {fork[name]['id']} {fork[name]['text']!r}" if fork[name] else f"{name} ends"
            for name in ("plain", "speculative")
        ]
        equal = f"equal ids: no, first fork at token {fork['position']} ({result['dtype']}, {fork['between']}): "
        equal += ", ".join(sides)
        equal += "" if fork["logit_gap"] is None else f", logit gap {fork['logit_gap']:.3g}"
    ratio = "-" if result["speedup"] is None else f"{result['speedup']:.2f}x"
    return [
        equal,
        f"speed-up: {ratio} (plain {result['plain_tokens_per_second']:.1f} tok/s, "
        f"speculative {result['speculative_tokens_per_second']:.1f} tok/s, "
        f"{result['tokens_per_step']:.2f} tokens per step, median of {result['repeat']})",
    ]
