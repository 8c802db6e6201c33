"""``redrafter serve``: a model and its drafter behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from redrafter.cli import options as opt
from redrafter.errors import InvalidRequest

HELP = """Serve MODEL over HTTP, as OpenAI's API does: chat and text completions, streaming, many requests at once.

A page to look at is at /, metrics for Prometheus at /metrics. API keys come from --api-key-file or from the
environment variable REDRAFTER_API_KEYS, separated by commas or line ends; without one, only this machine is served.

\b
Examples:
  redrafter serve
  redrafter serve ./my-model --drafter ./my-drafter --max-batch 16
  redrafter serve --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
"""

KEYS_VARIABLE = "REDRAFTER_API_KEYS"
SIGINT = 2


def register(app: typer.Typer) -> None:
    app.command("serve", help=HELP)(serve)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hub id, a folder or a GGUF file. Default: smollm2-135m-instruct.", show_default=False),
    ] = None,
    drafter: opt.Drafter = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line; any of them opens the server.", show_default=False)
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--i-know-this-is-open", help="Serve other machines without a key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that a Host header may hold; may be repeated.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its own name.", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests decoded at once.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait; more are told to come again.")] = 128,
    max_context: opt.MaxContext = None,
    backend: opt.Backend = "auto",
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    no_compile: opt.NoCompile = False,
    beam_width: opt.BeamWidth = None,
    branching: opt.Branching = None,
    draft_length: opt.DraftLength = None,
    tree_size: opt.TreeSize = None,
    prompt_lookup: opt.PromptLookup = opt.LOOKUP,
    request_metrics: Annotated[
        str, typer.Option(help="Acceptance in every answer: none, summary or detailed (each step).")
    ] = "summary",
    metrics_names: Annotated[
        str, typer.Option(help="Names in /metrics: native, or vllm for these and vLLM's and SGLang's.")
    ] = "vllm",
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running answers get on SIGTERM.")] = 30.0,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file: serve HTTPS.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.", show_default=False)] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; one JSON a line, no texts.")] = "info",
    quiet: opt.Quiet = False,
) -> int:
    for name, value, known in (
        ("request-metrics", request_metrics, ("none", "summary", "detailed")),
        ("metrics-names", metrics_names, ("native", "vllm")),
        ("log-level", log_level, ("debug", "info", "warning", "error")),
    ):
        if value not in known:
            raise InvalidRequest(f"--{name} {value!r} is unknown: use one of {', '.join(known)}")
    _check_installed()
    from redrafter.server.logs import to_stderr
    from redrafter.server.run import bind
    from redrafter.server.run import serve as run
    from redrafter.server.settings import ServeSettings

    settings = ServeSettings(
        model_name=model_name or "",
        host=host,
        port=port,
        api_keys=read_keys(api_key_file),
        open_to_all=open_to_all,
        allowed_hosts=tuple(allow_host or ()),
        max_queue=max_queue,
        request_metrics=request_metrics,  # type: ignore[arg-type]
        vllm_names=metrics_names == "vllm",
        drain=drain,
    )
    listener = bind(settings)  # before the model is loaded: a taken port is told at once
    config = opt.decode_config(beam_width, branching, draft_length, tree_size, prompt_lookup)
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
        max_batch=max_batch,
        compile=not no_compile,
        prompt_lookup=prompt_lookup,
    )
    settings = settings.named(model_name or llm.model)
    to_stderr(log_level)

    def tell(address: str) -> None:
        if not quiet:
            print(
                "\n".join(greeting(settings.model_name, llm.drafter, address, bool(settings.api_keys))), file=sys.stderr
            )

    tls = {"ssl_certfile": tls_certificate, "ssl_keyfile": tls_key}
    stopped_by = run(
        llm, settings, listener, tell, **{name: str(path) for name, path in tls.items() if path is not None}
    )
    return 130 if stopped_by == SIGINT else 0


def greeting(model: str, drafter: str | None, address: str, key: bool) -> list[str]:
    """What stands on stderr once the server listens: what it serves, where, and a line to try it with."""
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    return [
        f"model    {model}",
        f"drafter  {drafter or 'none: decoding is plain'}",
        f"address  {address}  (a page to look at; the API is at {address}/v1)",
        f"try      curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'",
    ]


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys of a file (one a line; # begins a comment) and of the environment. InvalidRequest: unusable ones."""
    lines = os.environ.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines()
    if path is not None:
        try:
            lines += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--api-key-file {path}: it cannot be read; give a UTF-8 file of keys") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if path is not None and not keys:
        raise InvalidRequest(f"--api-key-file {path} has no key in it: write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidRequest(
                f"API key {number} has {len(key)} characters or characters that no header can hold: use at least 8 "
                "printable ASCII ones without spaces"
            )
    return keys


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("uvicorn", "starlette", "msgspec", "prometheus_client") if not find_spec(name)]
    if missing:
        raise InvalidRequest(f"{', '.join(missing)} cannot be imported: pip install 'redrafter[serve]'")
