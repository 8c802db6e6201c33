"""``redrafter generate``: one answer, streamed; or the two ways compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.compare import compare
from redrafter.cli.display import statistics_lines, wants_color, writer
from redrafter.errors import InvalidRequest
from redrafter.params import SamplingParams

if TYPE_CHECKING:
    from redrafter.llm import LLM, Chunk, Completion, Prompt
    from redrafter.text import Piece

HELP = """Answer PROMPT, or what stands on standard input, and print statistics to stderr.

On a terminal, tokens that were drafted and accepted are blue, the model's own are bold orange.

\b
Examples:
  redrafter generate "Why is the sky blue?"
  redrafter generate "Why is the sky blue?" --compare
  redrafter generate - < question.txt
  redrafter generate "Write a limerick." --temperature 0.8 --seed 7 --json
  redrafter generate "Once upon a time" --raw --max-new-tokens 100 --stop "The end"
"""


def register(app: typer.Typer) -> None:
    app.command("generate", help=HELP)(generate)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The question; - or nothing: read stdin.")] = None,
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
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that sum to p; 1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens with this share of the likeliest's; 0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer, with or without speculation.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it is, without the chat template.")] = False,
    beam_width: opt.BeamWidth = None,
    branching: opt.Branching = None,
    draft_length: opt.DraftLength = None,
    tree_size: opt.TreeSize = None,
    prompt_lookup: opt.PromptLookup = opt.LOOKUP,
    speculation: Annotated[
        bool, typer.Option("--speculation/--no-speculation", help="Draft, or decode plainly.")
    ] = True,
    compare_ways: Annotated[
        bool, typer.Option("--compare", help="Decode plainly and with speculation; are the ids equal, what is faster?")
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="With --compare: times each way; medians are printed.")] = 3,
    allow_forks: Annotated[
        bool, typer.Option("--allow-forks", help="With --compare: a fork is no failure, except in float32.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")] = False,
    color: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    quiet: opt.Quiet = False,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
    )
    config = opt.decode_config(beam_width, branching, draft_length, tree_size, prompt_lookup)
    if compare_ways and not speculation:
        raise InvalidRequest("--compare and --no-speculation exclude each other: --compare runs both ways; drop one")
    in_color = wants_color(color, sys.stdout)
    asked = _prompt(prompt, system, raw)
    llm = opt.load_llm(
        model,
        drafter,
        dtype,
        device,
        max_context,
        backend=backend,
        config=config,
        threads=threads,
        quiet=quiet,
        compile=not no_compile,
        prompt_lookup=prompt_lookup,
    )
    if not quiet and speculation and not llm.engine.speculative:
        print(f"no speculation: drafter {llm.drafter or 'none'}; decoding plainly", file=sys.stderr)
    if compare_ways:
        code = compare(llm, asked, params, raw=raw, repeat=repeat, allow_forks=allow_forks, as_json=as_json)
        raise typer.Exit(code)
    if as_json:
        completion = llm.generate(asked, params, raw=raw, speculation=speculation)[0]
        print(json.dumps(describe(llm, completion, params, speculation), allow_nan=False))
    else:
        _stream(llm.stream(asked, params, raw=raw, speculation=speculation), writer(sys.stdout, in_color), quiet)


def _prompt(prompt: str | None, system: str | None, raw: bool) -> Prompt:
    """The prompt from the argument or stdin; a conversation if there is a system message."""
    if prompt is None and sys.stdin.isatty():
        raise InvalidRequest("no prompt was given: name one, or pipe it in")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"standard input is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): convert it"
            ) from error
    if not prompt.strip():
        raise InvalidRequest("the prompt is empty: give at least one character that is no space")
    if system is None:
        return prompt
    if raw:
        raise InvalidRequest("--system and --raw exclude each other: a raw prompt has no roles; drop one")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _stream(chunks: Iterable[Chunk], write: Callable[[Iterable[Piece]], None], quiet: bool) -> None:
    """Write the answer as it comes. What Ctrl-C or an error leaves behind is a whole line and its statistics."""
    last: Chunk | None = None
    written = False
    try:
        for chunk in chunks:
            # Before writing: an interrupt may come right after it.
            last, written = chunk, written or bool(chunk.spans)
            write(chunk.spans)
    finally:
        if written:
            print(flush=True)
        if last is not None and not quiet:
            print(*statistics_lines(last.statistics), sep="\n", file=sys.stderr)


def describe(llm: LLM, completion: Completion, params: SamplingParams, speculation: bool) -> dict[str, Any]:
    """The JSON form of an answer."""
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "statistics": completion.statistics.to_dict(),
        "model": llm.model,
        "drafter": llm.drafter,
        "settings": asdict(params) | {"speculation": speculation and llm.engine.speculative},
    }
