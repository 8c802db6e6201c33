"""The command in a process of its own: terminals, pipes, Ctrl-C, start-up."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANSWER = "the sky is blue"


def environment(**script: object) -> dict[str, str]:
    """This environment for a child, without what colours depend on and with the scripted engine's settings."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color", "SCRIPT": json.dumps({"answer": ANSWER} | script)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.cli.scripted_main", *arguments]


def on_terminal(env: dict[str, str]) -> tuple[int, str, str]:
    """Run with stdout on a pseudo-terminal: exit code, what the terminal got, stderr."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        command("generate", "why?"), stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE, env=env, cwd=ROOT
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the closed terminal as EIO
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert child.stderr is not None
    errors = child.stderr.read().decode()
    return child.wait(60), shown.decode(), errors


def test_a_terminal_gets_colours() -> None:
    code, shown, errors = on_terminal(environment())
    assert code == 0, errors
    assert "\x1b[38;5;" in shown and "\x1b[1;38;5;" in shown
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == ANSWER + "\r\n"


def test_a_reader_that_leaves_early_ends_it_quietly() -> None:
    child = subprocess.Popen(
        command("generate", "why?", "-q"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(answer="a" * 400, delay=0.01),
        cwd=ROOT,
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(3) == b"aaa"
    child.stdout.close()
    errors = child.stderr.read().decode()
    assert (child.wait(60), errors) == (1, "")


def test_ctrl_c_in_mid_stream_keeps_the_text_and_ends_with_130() -> None:
    child = subprocess.Popen(
        command("generate", "why?"),
        # A shell's background job ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(answer="abc" * 200, delay=0.2),
        cwd=ROOT,
    )
    assert child.stdout is not None
    first = os.read(child.stdout.fileno(), 3)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    text = (first + rest).decode()
    assert child.returncode == 130
    assert text.endswith("\n") and ("abc" * 200).startswith(text.strip()) and 3 <= len(text) < 400
    lines = errors.decode().splitlines()
    assert lines[-1] == "interrupted"
    assert lines[0].startswith(f"{len(text.strip())} tokens in ")
    assert "Traceback" not in errors.decode()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["--version"], ["generate", "x", "--top-k", "-1"]]
)
def test_what_needs_no_model_brings_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from redrafter.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'transformers', 'rich'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment(), text=True)
    assert done.returncode == (2 if "--top-k" in arguments else 0), done.stderr
    assert ("redrafter" in done.stdout) == ("--top-k" not in arguments)
