"""Run the prompts, plain and speculative by turns on one engine, and write down what each of them took."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from redrafter.bench.control import accepting_nothing, usual_shape, with_shape
from redrafter.bench.metrics import first_fork, looping
from redrafter.errors import InvalidRequest
from redrafter.load import settle_memory
from redrafter.params import DecodeConfig, SamplingParams

if TYPE_CHECKING:
    from redrafter.bench.mlx_lm_baseline import MLXLMBaseline, Streamed
    from redrafter.bench.prompts import BenchPrompt
    from redrafter.llm import LLM, Completion

WARM_UP_TOKENS = 8
WARM_UP_RUNS = 4
"""Where steps are recorded, the first batch runs untimed so often at most: each time other shapes may be tried."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run: sampling settings (prompt i has seed + i), requests at once, repetitions, whether both ways,
    whether the control for forks, and what else to compare with."""

    params: SamplingParams
    batch: int = 1
    repeat: int = 1
    plain: bool = True
    control: bool = False
    baseline: MLXLMBaseline | None = None


@dataclass(frozen=True)
class Measured:
    """records: one per finished prompt; batches: wall seconds of whole batches, and how many steps were recorded in the
    meantime, which takes as long as a hundred of them; partial: Ctrl-C came before the end;
    control: the shape of the control's steps; plain: each prompt's first plain answer, which is never written down."""

    records: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    partial: bool
    control: DecodeConfig | None = None
    plain: list[Completion] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """A batch, once: wall seconds from the first word of it to the last, prefill included."""

    seconds: float
    answers: list[Completion]


def check_fit(llm: LLM, prompts: Sequence[BenchPrompt]) -> None:
    """Every prompt can be asked. InvalidRequest names the first that cannot, before anything is run."""
    if llm.engine.backend.drafter is None:
        raise InvalidRequest("bench needs a drafter and has none: name a trained drafter's folder with --drafter")
    limit = llm.engine.context_limit
    for prompt in prompts:
        tokens = len(llm.encode(prompt.prompt))
        if tokens >= limit:
            raise InvalidRequest(
                f"prompt {prompt.id} has {tokens} tokens and the context holds {limit}: raise --max-context, "
                "or leave it out with --category or --limit"
            )


def measure(
    llm: LLM,
    prompts: Sequence[BenchPrompt],
    plan: Plan,
    tell: Callable[[str], None],
    save: Callable[[Measured], None],
) -> Measured:
    """``save`` is given what is finished after every batch; Ctrl-C ends the run and what is finished is returned."""
    llm.reuse_prefixes(False)  # the second way would skip the prompt that the first has read
    measured = Measured([], [], True)
    batches = [list(prompts[i : i + plan.batch]) for i in range(0, len(prompts), plan.batch)]
    try:
        tell("warming up")
        _warm_up(llm, batches, plan)
        settle_memory()
        started = time.perf_counter()
        for number, batch in enumerate(batches):
            _one_batch(llm, batch, number, plan, measured)
            save(measured)
            tell(_progress(measured, len(prompts), number + 1, len(batches), time.perf_counter() - started))
        if plan.control:
            measured = replace(measured, control=usual_shape(llm.engine.policy))
            _control(llm, batches, plan, measured, tell, save)
    except KeyboardInterrupt:
        return measured
    return replace(measured, partial=False)


def warm_up_said(llm: LLM, plan: Plan) -> str:
    """What ``measure`` runs untimed before anything else."""
    backend = llm.engine.backend
    if backend.graphs is None:
        few = min(WARM_UP_TOKENS, plan.params.max_new_tokens)
        if backend.run_ahead:
            return f"the first batch in full, {few} tokens of every other"
        return f"{few} tokens of the first batch"
    return f"the first batch in full until no new graph is recorded, at most {WARM_UP_RUNS} times"


def _warm_up(llm: LLM, batches: list[list[BenchPrompt]], plan: Plan) -> None:
    """Both ways. Where steps are recorded, a recording takes as long as a hundred steps, and one is due for every few
    rows that leave: a whole batch shows them all. A GPU without recordings compiles what a prompt's length needs,
    and what a longer answer does."""
    backend, ways = llm.engine.backend, (False, True) if plan.plain else (True,)
    if backend.graphs is None:
        few = replace(plan.params, max_new_tokens=min(WARM_UP_TOKENS, plan.params.max_new_tokens))
        for number, batch in enumerate(batches if backend.run_ahead else batches[:1]):
            params = few if number or not backend.run_ahead else plan.params
            for speculation in ways:
                run_batch(llm, batch, settings_of(params, 0, len(batch)), speculation)
    else:
        for _ in range(WARM_UP_RUNS):
            before = backend.graphs
            for speculation in ways:
                run_batch(llm, batches[0], settings_of(plan.params, 0, len(batches[0])), speculation)
            if backend.graphs == before:
                break
    if plan.baseline is not None:
        in_full = backend.graphs is None and backend.run_ahead
        tokens = plan.params.max_new_tokens if in_full else WARM_UP_TOKENS
        plan.baseline.run(llm.encode(batches[0][0].prompt), tokens)


def settings_of(params: SamplingParams, first: int, count: int) -> list[SamplingParams]:
    """Of prompts ``first`` onward: each has a seed of its own."""
    return [replace(params, seed=(params.seed + first + i) % 2**64) for i in range(count)]


def _progress(measured: Measured, prompts: int, done: int, batches: int, elapsed: float) -> str:
    left = elapsed / done * (batches - done)
    steps = sum(r["steps"] for r in measured.records)
    tokens = sum(r["answer_tokens"] for r in measured.records)
    rate = f"{tokens / steps:.2f} tokens per step" if steps else "no steps"
    return f"{len(measured.records)} of {prompts} prompts, {rate}, {left / 60:.0f} min {left % 60:.0f} s left"


def _one_batch(llm: LLM, batch: list[BenchPrompt], number: int, plan: Plan, measured: Measured) -> None:
    """Both ways, as often as asked; which one goes first alternates, so that a machine that slows down slows both."""
    settings = settings_of(plan.params, number * plan.batch, len(batch))
    runs: dict[bool, list[_Run]] = {False: [], True: []}
    streamed: list[Streamed] = []
    before = llm.engine.backend.graphs
    for turn in range(plan.repeat):
        if plan.baseline is not None:
            ids = llm.encode(batch[0].prompt)
            streamed.append(plan.baseline.run(ids, plan.params.max_new_tokens))
        for speculation in (False, True) if (number + turn) % 2 == 0 else (True, False):
            if speculation or plan.plain:
                runs[speculation].append(run_batch(llm, batch, settings, speculation))
    records = []
    for i, prompt in enumerate(batch):
        plain = [run.answers[i] for run in runs[False]]
        drafted = [run.answers[i] for run in runs[True]]
        record = {"id": prompt.id, "category": prompt.category, "batch": number, **_record(llm, plain, drafted)}
        records.append(record | (_baseline(plain, streamed) if streamed else {}))
    seconds = {way: [run.seconds for run in runs[way]] for way in runs}
    # Side by side: Ctrl-C must find both or neither.
    measured.records.extend(records)
    measured.plain.extend(runs[False][0].answers if plan.plain else [])
    after = llm.engine.backend.graphs
    recorded = None if before is None or after is None else after - before
    timed = {"plain_seconds": seconds[False], "speculative_seconds": seconds[True]}
    measured.batches.append(timed | {"graphs_recorded": recorded})


def _control(
    llm: LLM,
    batches: Sequence[list[BenchPrompt]],
    plan: Plan,
    measured: Measured,
    tell: Callable[[str], None],
    save: Callable[[Measured], None],
) -> None:
    """Every prompt once more, after all others: the steps are recorded differently (``control.py``)."""
    assert measured.control is not None, "a control needs a speculative shape"
    padded = with_shape(llm, measured.control)
    finished = iter(list(zip(measured.records, measured.plain, strict=True)))
    backend: Any = llm.engine.backend
    with accepting_nothing(backend):
        for number, batch in enumerate(batches):
            settings = settings_of(plan.params, number * plan.batch, len(batch))
            for answer in run_batch(padded, batch, settings, True).answers:
                assert not any(answer.statistics.accepted_at_depth), "the control accepted a drafted token"
                record, plain = next(finished)
                record["control_fork"] = _fork(llm, plain, [(answer, "control")])
            save(measured)
            tell(f"the control for forks, {number + 1} of {len(batches)} batches")


def run_batch(llm: LLM, batch: list[BenchPrompt], settings: list[SamplingParams], speculation: bool) -> _Run:
    """Answer the prompts at once. A request that fails raises."""
    started = time.perf_counter()
    answers = llm.generate([prompt.prompt for prompt in batch], settings, speculation=speculation)
    seconds = time.perf_counter() - started
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return _Run(seconds, answers)


def _record(llm: LLM, plain: Sequence[Completion], drafted: Sequence[Completion]) -> dict[str, Any]:
    """Counts are those of the first speculative run, seconds the medians of all; ``speedup`` is of whole requests."""
    answer, counts = drafted[0], drafted[0].statistics
    record: dict[str, Any] = {
        "prompt_tokens": counts.prompt_tokens,
        "answer_tokens": counts.answer_tokens,
        "plain_answer_tokens": plain[0].statistics.answer_tokens if plain else None,
        "finish_reason": answer.finish_reason,
        "ids_sha256": hashlib.sha256(" ".join(map(str, answer.token_ids)).encode()).hexdigest(),
        "equal": None,
        "fork": None,
        "looping": looping(answer.token_ids),
        "steps": counts.steps,
        "tokens_per_step": counts.tokens_per_step,
        "drafted_steps": counts.drafted_steps,
        "accepted_at_depth": list(counts.accepted_at_depth),
        "tree_nodes": counts.tree_nodes,
        "unmerged_tokens": counts.unmerged_tokens,
        "seconds": _seconds(drafted),
        "decode_seconds": _decode_seconds(drafted),
        "speedup": None,
    }
    if plain:
        others = [(run, "plain") for run in plain[1:]] + [(run, "speculative") for run in drafted]
        record["fork"] = _fork(llm, plain[0], others)
        record["equal"] = record["fork"] is None
        record["plain_seconds"], record["plain_decode_seconds"] = _seconds(plain), _decode_seconds(plain)
        record["speedup"] = record["plain_seconds"] / record["seconds"]
    return record


def _baseline(plain: Sequence[Completion], streamed: Sequence[Streamed]) -> dict[str, Any]:
    """Ours without speculation beside the baseline, from each one's first token on."""
    ours = statistics.median(a.statistics.seconds - a.statistics.first_token_seconds for a in plain)
    return {
        "plain_tokens_after_first": max(0, len(plain[0].token_ids) - 1),
        "plain_seconds_after_first": ours,
        "mlxlm_tokens_after_first": max(0, len(streamed[0].token_ids) - 1),
        "mlxlm_seconds_after_first": statistics.median(run.seconds for run in streamed),
        "mlxlm_equal": list(plain[0].token_ids) == streamed[0].token_ids,
    }


def _seconds(answers: Sequence[Completion]) -> float:
    return statistics.median(a.statistics.seconds for a in answers)


def _decode_seconds(answers: Sequence[Completion]) -> float:
    return statistics.median(a.statistics.seconds - a.statistics.prefill_seconds for a in answers)


def _fork(llm: LLM, plain: Completion, runs: Sequence[tuple[Completion, str]]) -> dict[str, Any] | None:
    """The earliest difference of any run, each with its way's name, from a plain one.

    logit_gap: the plain token's logit minus the other's, by a pass over one row and before any sampling setting; None
    where one of the answers had ended.
    """
    reference = plain.token_ids
    forks = [(at, run.token_ids, way) for run, way in runs if (at := first_fork(reference, run.token_ids)) is not None]
    if not forks:
        return None
    at, other, way = min(forks, key=lambda fork: fork[0])
    both = at < min(len(reference), len(other))
    logits = llm.next_logits([*plain.prompt_token_ids, *reference[:at]]) if both else []
    return {
        "position": at,
        "plain": reference[at] if at < len(reference) else None,
        "other": other[at] if at < len(other) else None,
        "other_is": way,
        "logit_gap": logits[reference[at]] - logits[other[at]] if both else None,
    }
