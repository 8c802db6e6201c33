"""``redrafter chat``: commands, errors, pipes and terminals, over a scripted engine and over a played server."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from redrafter.cli import main, options
from redrafter.cli.conversation import Tally, interrupts_wait
from tests import fakes
from tests.cli.test_process import ROOT, command, environment
from tests.server.page_server import Play, playing

ANSWER = "the sky is blue"


class Outcome(SimpleNamespace):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``redrafter chat`` with ``lines`` piped in; ``run.llm`` is the model it loads."""

    def run(*arguments: str, lines: list[str] | bytes = ()) -> Outcome:
        data = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main(["chat", *arguments])
        out, err = capsys.readouterr()
        return Outcome(code=code, out=out, err=err)

    run.llm = fakes.scripted(ANSWER)
    run.llm.engine.context_limit = 1000
    monkeypatch.setattr(options, "load_llm", lambda *a, **k: run.llm)
    monkeypatch.delenv("REDRAFTER_API_KEY", raising=False)
    return run


@pytest.fixture
def prompts(run) -> Callable[[], list[str]]:
    tokenizer = run.llm.tokenizer
    return lambda: [tokenizer._tokenizer.decode(ids, skip_special_tokens=False) for ids in run.llm.engine.prompts]


@pytest.fixture
def play() -> Iterator[Play]:
    with playing(Play()) as play:
        yield play


def test_a_pipe_is_one_question_a_line_and_a_conversation(run, prompts) -> None:
    outcome = run("--system", "be brief", lines=["one", "", "  ", "two"])
    assert (outcome.code, outcome.out) == (0, f"{ANSWER}\n{ANSWER}\n")
    start = "<|system|>be brief<|end|><|user|>one<|end|><|assistant|>"
    assert prompts() == [start, f"{start}{ANSWER}<|end|><|user|>two<|end|><|assistant|>"]
    assert outcome.err.count("tokens per step (bonus counted)") == 2
    assert run("-q", lines=["one"]).err == ""


def test_reset_and_a_question_that_starts_with_a_slash(run, prompts) -> None:
    run(lines=["one", "/reset", "//two"])
    assert prompts()[1] == "<|user|>/two<|end|><|assistant|>"


def test_settings_reach_the_model(run) -> None:
    asked = []
    stream = run.llm.stream

    def spy(messages, params, speculation):
        asked.append((params.seed, params.temperature, params.max_new_tokens, speculation))
        return stream(messages, params, speculation=speculation)

    run.llm.stream = spy
    outcome = run(
        "--seed", "5", "--max-new-tokens", "4", lines=["a", "/seed 7", "/temp 0.5", "/plain", "b", "/plain", "c"]
    )
    assert asked == [(5, 0.0, 4, True), (7, 0.5, 4, False), (7, 0.5, 4, True)]
    assert "the answer was cut: --max-new-tokens" in outcome.err
    assert "seed 7\ntemperature 0.5\nspeculation is off\n" in outcome.err


def test_stats_sum_over_answers(run) -> None:
    outcome = run(lines=["a", "b", "/stats"])
    tokens = len(run.llm.engine.answer)
    assert outcome.err.splitlines()[-1].startswith(f"answers: 2; {2 * tokens} tokens in ")


def test_a_tally_leaves_the_first_event_out_of_its_rate() -> None:
    one = Tally(answers=1, tokens=7, steps=3, seconds=3.0, first_seconds=1.0, decoded=4, decoding_seconds=2.0)
    both = Tally()
    both.add(one)
    both.add(Tally(answers=1, tokens=1, steps=1, seconds=2.0, first_seconds=2.0))
    assert one.line().startswith("7 tokens in 3.00 s, 2.0 tok/s, 2.33 tokens per step")
    assert both.line() == (
        "8 tokens in 5.00 s, 2.0 tok/s, 2.00 tokens per step (bonus counted), first token after 1.50 s"
    )
    assert Tally().line().startswith("0 tokens in 0.00 s, - tok/s, - tokens per step")


def test_save_writes_json_and_never_over_a_file(run, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    outcome = run("--system", "s", "--seed", "3", lines=["née", f"/save {path}", f"/save {path}"])
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [m["content"] for m in saved["messages"]] == ["s", "née", ANSWER]
    assert (saved["model"], saved["settings"]["seed"]) == ("tiny (drafter scripted)", 3)
    assert outcome.code == 2 and "name another file" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "lines", "says"),
    [
        ([], ["/nonsense"], "/nonsense is no command"),
        ([], ["/seed"], "/seed is no command as it stands"),
        ([], ["/seed x"], "/seed x is no number"),
        ([], ["/seed -1"], "seed=-1"),
        ([], ["/temp nan"], "temperature=nan"),
        ([], ["/quit now"], "/quit now is no command"),
        ([], b"\xff\n", "line 1 of standard input is not UTF-8"),
        ([], ["x" * 2000], "the context holds"),
        (["--temperature", "-1"], [], "temperature=-1.0"),
        (["--color", "green"], [], "'green'"),
        (["--api-key", "K"], [], "add --url"),
        (["--url", "127.0.0.1"], [], "no address of a server"),
        (["--url", "http://127.0.0.1:x"], [], "for example http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:1"], [], "is a server running there?"),
        (["--url", "http://127.0.0.1:1", "--model", "m"], [], "--url and --model exclude each other"),
        (["--url", "http://127.0.0.1:1", "--dtype", "float32"], [], "--url and --dtype exclude each other"),
        (["--url", "http://127.0.0.1:1", "--api-key", "NO_SUCH_KEY"], [], "NO_SUCH_KEY"),
    ],
)
def test_what_is_wrong_is_one_line(run, arguments, lines, says: str) -> None:
    outcome = run(*arguments, lines=lines)
    assert outcome.code in (1, 2) and outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("error: ") and says in outcome.err


def test_on_a_terminal_an_error_ends_a_turn_and_its_question_is_forgotten(run, prompts, monkeypatch, capsys) -> None:
    typed = iter(["one", KeyboardInterrupt(), "/nonsense", "two", "/help", EOFError()])

    def read(prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        run.llm.engine.fail_after = 0 if line == "one" else None
        return line

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n"
    assert "error: request 'request-0': the logits are not finite" in err
    assert "Ctrl-D or /quit leaves" in err and "/nonsense is no command" in err and "/save FILE" in err
    assert prompts() == ["<|user|>one<|end|><|assistant|>", "<|user|>two<|end|><|assistant|>"]


def test_a_server_is_asked_in_its_own_words(run, play: Play, monkeypatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm")
    lines = ["why?", "/plain", "again"]
    outcome = run("--url", f"{play.url}/v1/", "--seed", "3", "--system", "s", "--color", "always", lines=lines)
    assert outcome.code == 0, outcome.err
    assert "\x1b[38;2;47;143;216m blue\x1b[0m" in outcome.out and "\x1b[1;38;2;213;94;0mThe\x1b[0m" in outcome.out
    first, second = play.asked
    assert first | {"messages": None} == {
        "model": "tiny",
        "messages": None,
        "temperature": 0.0,
        "seed": 3,
        "max_tokens": 256,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second["speculation"] is False
    assert [m["content"] for m in second["messages"]] == ["s", "why?", "The sky is blue today.", "again"]
    speculative, _, plain = outcome.err.splitlines()
    assert speculative.startswith("6 tokens in ") and "1.50 tokens per step" in speculative
    assert plain.startswith("6 tokens in ") and "1.00 tokens per step" in plain


def test_a_key_comes_from_the_environment(run, play: Play, monkeypatch) -> None:
    play.key = "secret"
    refused = run("--url", play.url, lines=["why?"])
    assert refused.code == 1 and "name the variable that holds it with --api-key" in refused.err
    monkeypatch.setenv("MINE", "secret")
    assert run("--url", play.url, "--api-key", "MINE", lines=["why?"]).code == 0
    monkeypatch.setenv("REDRAFTER_API_KEY", "secret")
    assert run("--url", play.url, lines=["why?"]).out == "The sky is blue today.\n"


def test_control_characters_of_a_server_do_not_reach_the_terminal(run, play: Play) -> None:
    play.steps = [([("a\x1b]0;x\x07b", False)], None)]
    assert "\x1b]" not in run("--url", play.url, "--color", "always", lines=["x"]).out
    play.status, play.words = 400, "bad \x1b[31m words"
    assert "\x1b" not in run("--url", play.url, lines=["x"]).err


def test_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_wait() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(typer.Exit) as leaving:
            signal.raise_signal(signal.SIGINT)
    assert leaving.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stops_the_answer_and_not_the_chat_and_ctrl_d_leaves() -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen(
        command("chat"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(answer="abc" * 300, delay=0.05, stride=3),
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C reaches it
    )
    os.close(slave)
    shown = b""

    def until(pattern: bytes) -> None:
        nonlocal shown
        while not re.search(pattern, re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", shown)):
            shown += os.read(master, 4096)

    until(b"Ctrl-D leaves\r\n> ")
    os.write(master, b"why?\n")
    until(b"abcabc")
    os.write(master, b"\x03")
    until(rb"stopped\r\n.* first token after [\d.]+ s\r\n> ")
    os.write(master, b"\x04")
    with contextlib.suppress(OSError):  # Linux reports the closed terminal as EIO
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert child.wait(60) == 0
    assert b"abc" * 300 not in shown and b"Traceback" not in shown
