"""``redrafter bench``: plain and speculative decoding measured side by side; figures and a page from the result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.bench.measure import Plan
from redrafter.bench.metrics import NEEDS_CUDA, known_metrics
from redrafter.bench.mlx_lm_baseline import MLXLMBaseline, open_baseline
from redrafter.bench.prompts import BenchPrompt, groups_of, load_prompts, select
from redrafter.bench.provenance import checkout, command_line, load_average, models, source
from redrafter.bench.report import key_figures, page
from redrafter.bench.results import FIGURES, check_place, figures_of, parse_figures, read_result, write_figures
from redrafter.bench.run import Job, result_path, run
from redrafter.cli import options as opt
from redrafter.errors import InvalidRequest
from redrafter.params import SamplingParams

if TYPE_CHECKING:
    from redrafter.llm import LLM

INTERRUPTED = 130

HELP = """Measure speculative against plain decoding on the same engine, prompt by prompt, by turns.

Writes one JSON with its provenance, after every prompt; Ctrl-C keeps what is finished. No prompt and no answer is
stored.

\b
Examples:
  redrafter bench
  redrafter bench --prompts questions.jsonl --limit 20 --spread --dtype bfloat16
  redrafter bench --prompts questions.jsonl --no-plain --tree-size 64
  redrafter bench --prompts questions.jsonl --device cuda --dtype bfloat16 --tree-size 64 --control
  redrafter bench --figure cpu_speedup=speedup
  redrafter bench --report benchmarks/results/RESULT.json -o page.html
"""


def register(app: typer.Typer) -> None:
    app.command("bench", help=HELP)(bench)


def bench(
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with prompt, messages or turns; id, category. Default: 12 of ours.", show_default=False
        ),
    ] = None,
    category: Annotated[str, typer.Option(help="Only categories that start with this.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts.", show_default=False)] = None,
    spread: Annotated[bool, typer.Option("--spread", help="With --limit: evenly spaced, not the first.")] = False,
    model: opt.Model = None,
    drafter: opt.Drafter = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    max_context: opt.MaxContext = None,
    threads: opt.Threads = None,
    no_compile: opt.NoCompile = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Prompt number i has seed + i.")] = 0,
    beam_width: opt.BeamWidth = None,
    branching: opt.Branching = None,
    draft_length: opt.DraftLength = None,
    tree_size: opt.TreeSize = None,
    prompt_lookup: opt.PromptLookup = opt.LOOKUP,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once, each way.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Times each way; seconds are medians.")] = 1,
    no_plain: Annotated[bool, typer.Option("--no-plain", help="Speculative only: tokens per step.")] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Also count forks of plain decoding with steps of the speculative size."),
    ] = False,
    instrument: Annotated[
        str | None,
        typer.Option(
            help="GPU: the model at the cost of a large shape, llama-2-7b or qwen2.5-1.5b.", show_default=False
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="mlx-lm: time its stream_generate too, by turns.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("benchmarks/results"),
    name: Annotated[
        str | None, typer.Option(help="The result's file name. Default: date, model, dtype.", show_default=False)
    ] = None,
    figure: Annotated[
        list[str] | None, typer.Option(help="KEY=METRIC into benchmarks/figures.json; may be repeated.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Run nothing: draw this result, or take figures from it.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --report: the page.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result on stdout.")] = False,
    quiet: opt.Quiet = False,
) -> None:
    if report is not None:
        _report(report, output, figure or [])
        return
    params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    config = opt.decode_config(beam_width, branching, draft_length, tree_size, prompt_lookup)
    found = load_prompts(prompts)
    chosen = select(found, category, limit, spread)
    cuda = _needs_cuda(figure or [], backend, device) or instrument is not None
    metrics = _metrics(chosen, not no_plain, baseline is not None, cuda, control)
    wanted = parse_figures(figure or [], metrics, not no_plain)
    planned = result_path(out, name, "model", dtype)
    if wanted:
        check_place(planned, _root(), source()["commit"])
    if not quiet and (load_average() or 0.0) > 1:
        print(
            f"warning: the machine is busy (load average {load_average()}): times will not mean much", file=sys.stderr
        )
    started = time.perf_counter()
    opened = (model, drafter, dtype, device, max_context)
    settings: dict[str, Any] = {"config": config, "max_batch": batch, "compile": not no_compile}
    settings["prompt_lookup"] = prompt_lookup
    if instrument is None:
        llm = opt.load_llm(*opened, backend=backend, threads=threads, quiet=quiet, **settings)
    else:
        llm = _instrument(instrument, *opened, backend=backend, **settings)
    if not llm.engine.speculative and not quiet:
        print("no speculation: drafting does not pay here; name a --tree-size to measure it anyway", file=sys.stderr)
    path = result_path(out, name, llm.model, llm.dtype)
    job = Job(
        found=found,
        prompts=chosen,
        plan=Plan(
            params=params,
            batch=batch,
            repeat=repeat,
            plain=not no_plain,
            control=control,
            baseline=_baseline(baseline, llm, params, batch, model) if baseline else None,
        ),
        weights=_weights(model, drafter, instrument),
        start_seconds=time.perf_counter() - started,
        command=command_line(sys.argv[1:]),
    )
    with opt.progress(quiet) as tell:
        result = run(llm, job, path, tell)
    _show(result, path, as_json, quiet)
    if result["partial"]:
        raise typer.Exit(INTERRUPTED)
    if wanted:
        _record(result, wanted, path)


def _metrics(chosen: Sequence[BenchPrompt], plain: bool, baseline: bool, cuda: bool, control: bool) -> dict[str, str]:
    for name, asked in (("--baseline", baseline), ("--control", control)):
        if asked and not plain:
            raise InvalidRequest(f"{name} compares with plain decoding: drop --no-plain")
    return known_metrics(groups_of(chosen), plain, baseline, cuda, control)


def _needs_cuda(figure: Sequence[str], backend: str, device: str) -> bool:
    """Whether a figure is of a step's parts or of memory, which take an NVIDIA GPU. InvalidRequest: there is none."""
    asked = [text for text in figure if text.partition("=")[2] in NEEDS_CUDA]
    if asked and not _is_cuda(backend, device):
        raise InvalidRequest(f"--figure {asked[0]!r} is measured on an NVIDIA GPU: use --device cuda")
    return bool(asked)


def _is_cuda(backend: str, device: str) -> bool:
    from redrafter.backends.torch.load import pick_device
    from redrafter.load import pick_backend

    return pick_backend(backend) == "torch" and pick_device(device).type == "cuda"


def _instrument(
    shape: str,
    model: str | None,
    drafter: str,
    dtype: str,
    device: str,
    max_context: int | None,
    *,
    backend: str,
    **settings: Any,
) -> LLM:
    """The model and its drafter widened to a large shape, for an NVIDIA GPU."""
    from redrafter.backends.torch.load import pick_device, pick_dtype
    from redrafter.bench.instrument import open_instrument
    from redrafter.bench.widen import SHAPES
    from redrafter.models import DEFAULT_MODEL, check_supported, resolve, resolve_drafter

    if shape not in SHAPES:
        raise InvalidRequest(f"--instrument {shape!r} is unknown: use one of {', '.join(SHAPES)}")
    if not _is_cuda(backend, device):
        raise InvalidRequest(f"--instrument {shape}: a CPU takes seconds for each of its steps: use --device cuda")
    files = resolve(model or DEFAULT_MODEL)
    folder = resolve_drafter(opt.drafter_folder(drafter), files)
    if folder is None:
        raise InvalidRequest(f"--drafter {drafter}: the instrument needs a drafter of {files.name}: name a folder")
    where = pick_device(device)
    return open_instrument(
        shape,
        files,
        folder,
        device=where,
        dtype=pick_dtype(dtype, where),
        max_context=check_supported(files.config, max_context),
        **settings,
    )


def _baseline(name: str, llm: LLM, params: SamplingParams, batch: int, model: str | None) -> MLXLMBaseline:
    from redrafter.models import DEFAULT_MODEL, resolve

    return open_baseline(name, llm, resolve(model or DEFAULT_MODEL).path, batch, params.temperature)


def _record(result: dict[str, Any], wanted: dict[str, str], path: Path) -> None:
    write_figures(_root(), figures_of(result, wanted, path, _root()))
    if result["provenance"]["source"]["dirty"]:
        print("warning: the code differs from the commit that the figures name", file=sys.stderr)
    print(f"{FIGURES} was written; now run: python docs/figures.py", file=sys.stderr)


def _root() -> Path:
    """Where benchmarks/figures.json is: the checkout, or the current folder for a copy without its history."""
    return checkout() or Path.cwd()


def _weights(model: str | None, drafter: str, instrument: str | None) -> dict[str, Any]:
    """Names and weights on disk; an instrument is named as what it is."""
    from redrafter.models import DEFAULT_MODEL, resolve, resolve_drafter

    files = resolve(model or DEFAULT_MODEL)
    found = models(files, resolve_drafter(opt.drafter_folder(drafter), files))
    if instrument is not None:
        found["model"]["name"] += f" widened to {instrument}"
    return found


def _report(path: Path, output: Path | None, figure: Sequence[str]) -> None:
    result = read_result(path)
    if output is None and not figure:
        raise InvalidRequest(f"--report {path} asks for nothing: add -o PAGE.html, or --figure KEY=METRIC")
    if figure:
        # Results of other commands (eval, data, the scripts of benchmarks/) compare with nothing.
        plain = result.get("settings", {}).get("plain", True)
        _record(result, parse_figures(figure, result["units"], plain), path)
    if output is not None:
        if "prompts" not in result:
            raise InvalidRequest(f"{path} is no result of bench: there is no page of it, only --figure KEY=METRIC")
        output.write_text(page(result), encoding="utf-8")


def _show(result: dict[str, Any], path: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, title="partial" if result["partial"] else None)
        for row in key_figures(result):
            table.add_row(*row)
        Console().print(table)
    else:
        print(*(f"{title:<42}{value}" for title, value in key_figures(result)), sep="\n")
    if not quiet:
        where = path.with_suffix(".partial.json") if result["partial"] else path
        print(f"result: {where}", file=sys.stderr)
