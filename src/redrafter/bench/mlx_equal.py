"""Do torch and MLX give the same answers? Float32 on the CPU, both from the same files, every second prompt sampled.

    python -m redrafter.bench.mlx_equal QUESTIONS.jsonl --figure mlx_cpu_equal_prompts

The result is written after every prompt; a run that was interrupted goes on where it stopped. torch speculates and MLX
does not, so that the answers are of two frameworks, two kernels and two ways. Two tokens whose scores differ by less
than float32 rounding may be exchanged: such a prompt is not counted as equal, and it is listed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter.bench.metrics import first_fork
from redrafter.bench.prompts import BenchPrompt, PromptSet, load_prompts
from redrafter.bench.provenance import checkout, machine, models, now, portable, source
from redrafter.bench.results import figures_of, parse_figures, write_figures, write_json
from redrafter.errors import InvalidRequest, RedrafterError
from redrafter.models import DEFAULT_MODEL
from redrafter.params import SamplingParams

if TYPE_CHECKING:
    from redrafter.llm import LLM

ROUNDING = 1e-3
"""A difference of logits that float32 rounding over 30 layers can make."""
UNITS = {"equal_prompts": "prompts", "ties": "prompts", "prompts": "prompts", "answer_tokens": "tokens"}
OUT = Path("benchmarks") / "results" / "mlx-equals-torch.json"


def shortest(found: PromptSet, count: int) -> list[BenchPrompt]:
    """Prompts whose text is shortest: the answers are what is compared."""
    return sorted(found.prompts, key=lambda prompt: (len(str(prompt.prompt)), prompt.id))[:count]


def compare_one(ours: LLM, theirs: LLM, prompt: BenchPrompt, number: int, tokens: int) -> dict[str, Any]:
    params = SamplingParams(max_new_tokens=tokens, temperature=0.7 * (number % 2), seed=number)
    mine, other = (llm.generate(prompt.prompt, params)[0] for llm in (ours, theirs))
    for answer in (mine, other):
        if answer.error is not None:
            raise answer.error
    at = first_fork(mine.token_ids, other.token_ids)
    record: dict[str, Any] = {
        "id": prompt.id,
        "temperature": params.temperature,
        "seed": number,
        "answer_tokens": len(other.token_ids),
        "equal": at is None,
    }
    if at is not None:
        context = [*mine.prompt_token_ids, *mine.token_ids[:at]]
        pairs = zip(ours.next_logits(context), theirs.next_logits(context), strict=True)
        record["position"] = at
        record["largest_logit_difference"] = max(abs(a - b) for a, b in pairs)
    return record


def compare(
    ours: LLM,
    theirs: LLM,
    prompts: Sequence[BenchPrompt],
    tokens: int,
    done: Sequence[dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A record per prompt; those ``done`` already are not asked again. ``save`` is given all after each."""
    records = list(done)
    for number in range(len(records), len(prompts)):
        records.append(compare_one(ours, theirs, prompts[number], number, tokens))
        save(records)
    return records


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    ties = [r for r in records if not r["equal"] and r["largest_logit_difference"] < ROUNDING]
    return {
        "prompts": len(records),
        "equal_prompts": sum(r["equal"] for r in records),
        "ties": len(ties),
        "answer_tokens": sum(r["answer_tokens"] for r in records),
    }


def open_both(model: str, drafter: str) -> tuple[LLM, LLM]:
    """MLX, which does not speculate, and torch, which does if there is a drafter."""
    from redrafter.llm import LLM

    def opened(drafter: str, backend: str) -> LLM:
        return LLM.from_pretrained(model, drafter=drafter, backend=backend, dtype="float32", device="cpu")

    return opened("none", "mlx"), opened(drafter, "torch")


def run(asked: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison, resumed from what lies beside ``asked.out``. Raises InvalidRequest where that is of another
    run."""
    from redrafter.models import resolve, resolve_drafter

    found = load_prompts(asked.prompts)
    prompts = shortest(found, asked.count)
    files = resolve(asked.model)
    settings = {"tokens": asked.tokens, "count": len(prompts), "prompts_sha256": found.sha256, "plain": True}
    weights = models(files, resolve_drafter(asked.drafter, files))
    unfinished = asked.out.with_suffix(".partial.json")
    done = _resume(unfinished, {**settings, **weights})
    ours, theirs = open_both(asked.model, asked.drafter)
    facts = {
        "source": source(),
        "command": shlex.join(["python", "-m", "redrafter.bench.mlx_equal", *map(portable, sys.argv[1:])]),
        "date": now(),
        "machine": machine(theirs.engine.backend.device),  # type: ignore[attr-defined]
        "dtype": "float32",
        **weights,
    }

    def result(records: list[dict[str, Any]], partial: bool) -> dict[str, Any]:
        made = {"partial": partial, "summary": summarise(records), "units": UNITS, "settings": settings}
        return {**made, "provenance": facts, "prompts": records}

    def save(records: list[dict[str, Any]]) -> None:
        write_json(unfinished, result(records, True))
        tell(f"{len(records)} of {len(prompts)} prompts, {summarise(records)['equal_prompts']} equal")

    finished = result(compare(ours, theirs, prompts, asked.tokens, done, save), False)
    write_json(asked.out, finished)
    unfinished.unlink(missing_ok=True)
    return finished


def _resume(path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    facts = {**old["settings"], "model": old["provenance"]["model"], "drafter": old["provenance"]["drafter"]}
    if facts != wanted:
        raise InvalidRequest(f"{path} is of another model, drafter, prompts or length: delete it or use another --out")
    records: list[dict[str, Any]] = old["prompts"]
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Count the prompts for which torch and MLX give the same answer.")
    parser.add_argument("prompts", type=Path, help="JSONL as bench reads it")
    parser.add_argument("--count", type=int, default=50, help="so many of the shortest prompts")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", default=None, help="key of benchmarks/figures.json for the equal prompts")
    asked = parser.parse_args(arguments)
    root = checkout() or Path.cwd()
    wanted = parse_figures([f"{asked.figure}=equal_prompts"], UNITS, True) if asked.figure else {}
    result = run(asked, lambda line: print(line, file=sys.stderr, flush=True))
    if wanted:
        write_figures(root, figures_of(result, wanted, asked.out, root))
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    try:
        main()
    except RedrafterError as error:
        sys.exit(f"error: {error}")
