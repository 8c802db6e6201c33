"""One run: prompts, a loaded model, a plan -> the result that is written, shown and drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.bench.control import usual_shape
from redrafter.bench.measure import Measured, Plan, check_fit, measure, warm_up_said
from redrafter.bench.metrics import known_metrics, summarise
from redrafter.bench.mlx_lm_baseline import NAME as NAME_OF_BASELINE
from redrafter.bench.prompts import BenchPrompt, PromptSet, groups_of
from redrafter.bench.provenance import machine, now, peak_memory_bytes, portable, source
from redrafter.bench.results import write_json
from redrafter.errors import InvalidRequest

if TYPE_CHECKING:
    from redrafter.llm import LLM

NAME = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run and what to write about it.

    weights: names, bytes and SHA-256 of target and drafter (``provenance.models``); start_seconds: loading them took
    that long; command: the command line without this machine's folders; memory: on a GPU, count it too.
    """

    found: PromptSet
    prompts: Sequence[BenchPrompt]
    plan: Plan
    weights: Mapping[str, Any]
    start_seconds: float
    command: str
    memory: bool = True


def result_path(out: Path, name: str | None, model: str, dtype: str) -> Path:
    """The file of a run; unless one is given, its name says date and time (UTC), model and dtype."""
    if name is None:
        made = "-".join((now()[:19].replace(":", ""), Path(model).name, dtype))
        name = re.sub(r"[^\w.+-]+", "-", made)
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"--name {name!r} is not a file name: use letters, digits, and . _ + - inside")
    return out / f"{name.removesuffix('.json')}.json"


def run(llm: LLM, job: Job, path: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure and write. Until the end, what is finished lies beside ``path`` as ``.partial.json``, marked partial, so
    that neither a kill nor Ctrl-C loses it, and an older result under that name stays whole."""
    check_fit(llm, job.prompts)
    if job.plan.control and usual_shape(llm.engine.policy) is None:
        raise InvalidRequest("--control takes the speculative shape and there is none here: name a --tree-size")
    facts = _facts(llm, job)
    unfinished = path.with_suffix(".partial.json")
    measured = measure(
        llm, job.prompts, job.plan, tell, lambda some: write_json(unfinished, _result(llm, job, facts, some))
    )
    result = _result(llm, job, facts, measured)
    if not measured.partial and on_cuda(llm):
        tell("counting memory, timing the parts of a step")
        if job.memory:
            _add_memory(llm, job, result)
        _add_roofline(llm, result)
    if measured.partial:
        write_json(unfinished, result)
    else:
        write_json(path, result)
        unfinished.unlink(missing_ok=True)
    return result


def on_cuda(llm: LLM) -> bool:
    return llm.engine.backend.device.type == "cuda"  # type: ignore[attr-defined]


def _add_memory(llm: LLM, job: Job, result: dict[str, Any]) -> None:
    """What either way holds at most, after ``peak_memory_bytes`` was read: counting begins anew."""
    from redrafter.bench.memory import memory

    shapes = [shape for shape in llm.engine.policy.shapes if shape.speculative]
    if not shapes:
        return
    largest = max(shapes, key=lambda shape: shape.tree_size)
    batch = list(job.prompts[: job.plan.batch])
    result["memory"] = {"shape": asdict(largest), "prompts": len(batch), "rows": llm.engine.backend.rows}
    result["summary"] |= memory(llm, largest, batch, job.plan)


def _add_roofline(llm: LLM, result: dict[str, Any]) -> None:
    """What a step of one request costs, part by part, after everything else was measured."""
    from redrafter.bench.roofline import roofline

    shape = next((shape for shape in llm.engine.policy.shapes if shape.speculative), None)
    if shape is None:  # only plain decoding was asked for
        return
    found = roofline(llm.engine.backend, shape)  # type: ignore[arg-type]
    result["roofline"] = {"shape": asdict(shape), "phases_ms": found.pop("phases"), **found}
    result["summary"] |= found


def _forecasts(llm: LLM) -> list[dict[str, Any]]:
    """What the choice of each step's shape rested on in the end."""
    return [line._asdict() | {"config": asdict(line.config)} for line in llm.engine.policy.table()]


def _facts(llm: LLM, job: Job) -> dict[str, Any]:
    """Provenance: read once, when the run starts."""
    found = job.found
    return {
        "source": source(),
        "command": job.command,
        "date": now(),
        "machine": machine(llm.engine.backend.device),  # type: ignore[attr-defined]
        "dtype": llm.dtype,
        **job.weights,
        "prompts": {
            "name": portable(found.name),
            "sha256": found.sha256,
            "in_file": found.total,
            "selected": len(job.prompts),
        },
    }


def _result(llm: LLM, job: Job, facts: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    plan = job.plan
    units = known_metrics(groups_of(job.prompts), plan.plain, plan.baseline is not None, on_cuda(llm), plan.control)
    memory = peak_memory_bytes(llm.engine.backend.device)  # type: ignore[attr-defined]
    drafter = job.weights["drafter"]
    summary = summarise(measured.records, measured.batches) | {
        "drafter_bytes": None if drafter is None else drafter["bytes"],
        "start_seconds": job.start_seconds,
        "peak_memory_bytes": memory["host"] if memory["gpu"] is None else memory["gpu"],
    }
    return {
        "partial": measured.partial,
        "summary": summary,
        "units": units,
        "shape": asdict(llm.engine.config),
        "cost_table": _forecasts(llm),
        "control": None if measured.control is None else {"shape": asdict(measured.control)},
        "settings": {
            "temperature": plan.params.temperature,
            "seed": plan.params.seed,
            "max_new_tokens": plan.params.max_new_tokens,
            "batch": plan.batch,
            "repeat": plan.repeat,
            "warm_up": warm_up_said(llm, plan),
            "plain": plan.plain,
            "control": plan.control,
            "baseline": None if plan.baseline is None else NAME_OF_BASELINE,
        },
        "memory_bytes": memory,
        "provenance": dict(facts),
        "batches": measured.batches,
        "prompts": measured.records,
    }
