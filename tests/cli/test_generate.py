"""``redrafter generate`` in this process, over a scripted engine: output, exit codes, errors."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from redrafter.cli import main, options
from redrafter.cli.display import wants_color, writer
from redrafter.params import DecodeConfig
from redrafter.text import Piece
from tests import fakes

ANSWER = "the sky is blue, née 你好 😀"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``redrafter generate``; ``run.llm`` is the model it is given, ``run.asked`` how it was asked for it."""

    def run(*arguments: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["generate", *arguments])
        return Outcome(code, *capsys.readouterr())

    def load(*arguments: object, **settings: object) -> object:
        run.asked = SimpleNamespace(arguments=arguments, **settings)
        return run.llm

    run.llm = fakes.scripted(ANSWER)
    monkeypatch.setattr(options, "load_llm", load)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


def test_text_on_stdout_statistics_on_stderr(run) -> None:
    outcome = run("why?")
    assert (outcome.code, outcome.out) == (0, ANSWER + "\n")
    speed, speculation = outcome.err.splitlines()
    tokens = len(run.llm.engine.answer)
    assert speed.startswith(f"{tokens} tokens in ")
    assert "tok/s" in speed and "tokens per step" in speed and "first token after" in speed
    assert speculation == "accepted at depth 1, 2, ...: 1.00 1.00; 8.0 tree nodes per step, merging removed 50%"
    assert run("why?", "--quiet").err == ""


def test_plain_decoding_says_nothing_of_speculation(run) -> None:
    outcome = run("why?", "--no-speculation")
    assert outcome.out == ANSWER + "\n"
    assert len(outcome.err.splitlines()) == 1


def test_a_missing_drafter_is_said(run) -> None:
    run.llm.engine.speculative = False
    run.llm.drafter = None
    assert "no speculation: drafter none; decoding plainly" in run("why?").err


def test_json_is_one_object_with_everything(run) -> None:
    outcome = run("why?", "--json", "--seed", "3", "--stop", "blue", "--stop", "x", "--temperature", "0.5")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert set(found) == {"text", "token_ids", "finish_reason", "statistics", "model", "drafter", "settings"}
    assert found["text"] == "the sky is "
    assert run.llm.tokenizer.decode(found["token_ids"]) == "the sky is blue"
    assert (found["finish_reason"], found["model"], found["drafter"]) == ("stop", "tiny", "scripted")
    assert found["settings"]["stop"] == ["blue", "x"]
    assert (found["settings"]["seed"], found["settings"]["temperature"]) == (3, 0.5)
    assert found["settings"]["speculation"] is True
    assert found["statistics"]["tokens_per_step"] > 2
    assert len(found["statistics"]["acceptance_per_depth"]) == 2


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_stdin_is_one_prompt_of_many_lines(run, arguments: list[str]) -> None:
    assert run(*arguments, stdin="line one\nlíne two\n\n".encode()).code == 0
    assert run.llm.tokenizer.decode(run.llm.engine.prompts[0]) == "line one\nlíne two\n"


def test_system_and_raw_shape_the_prompt(run) -> None:
    run("why?", "--system", "be brief")
    run("why?", "--raw")
    encode = run.llm.tokenizer.encode
    expected = ["<|system|>be brief<|end|><|user|>why?<|end|><|assistant|>", "why?"]
    assert run.llm.engine.prompts == [encode(text) for text in expected]


def test_the_beam_shape_is_the_programs_unless_one_is_given(run) -> None:
    run("why?")
    assert run.asked.config is None
    run("why?", "--beam-width", "4", "--tree-size", "20")
    assert run.asked.config == DecodeConfig(beam_width=4, tree_size=20)


def test_color_always_marks_the_drafted_and_auto_is_plain_when_piped(run, monkeypatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in run("why?").out
    colored = run("why?", "--color", "always").out
    assert "\x1b[38;2;47;143;216mt\x1b[0m" in colored
    assert "\x1b[1;38;2;213;94;0m" in colored


def test_control_characters_of_an_answer_are_text_on_a_terminal_and_untouched_in_a_pipe(run) -> None:
    run.llm = fakes.scripted("a\x1b]0;x\x07\tb\n\x9bc")
    assert run("why?").out == "a\x1b]0;x\x07\tb\n\x9bc\n"
    colored = run("why?", "--color", "always").out
    assert "\x1b]" not in colored and "\x07" not in colored and "\x9b" not in colored
    assert "␛" in colored and "\t" in colored


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "says"),
    [
        (["   "], b"", 2, "the prompt is empty"),
        ([], b"", 2, "the prompt is empty"),
        (["-"], b"\xff", 2, "not UTF-8"),
        (["x" * 100], b"", 2, "the context holds 64"),
        (["x", "--temperature", "-1"], b"", 2, "temperature=-1.0"),
        (["x", "--top-p", "0"], b"", 2, "top_p=0.0"),
        (["x", "--max-new-tokens", "0"], b"", 2, "max_new_tokens=0"),
        (["x", "--beam-width", "0"], b"", 2, "beam_width=0"),
        (["x", "--tree-size", "100000"], b"", 2, "tree_size=100000"),
        (["x", "--stop", ""], b"", 2, "stop=''"),
        (["x", "--color", "green"], b"", 2, "'green'"),
        (["x", "--raw", "--system", "y"], b"", 2, "exclude each other"),
        (["x", "--compare", "--no-speculation"], b"", 2, "exclude each other"),
        (["x", "--nonsense"], b"", 2, "No such option"),
        (["x", "--seed", "abc"], b"", 2, "--seed"),
    ],
)
def test_bad_input_is_one_line_on_stderr(run, arguments, stdin, code: int, says: str) -> None:
    outcome = run(*arguments, stdin=stdin)
    assert outcome.code == code
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("error: ") and says in outcome.err


def test_a_chat_template_that_fails_is_one_line(run) -> None:
    run.llm.tokenizer._tokenizer.chat_template = "{{ raise_exception('only\nquestions') }}"
    outcome = run("x")
    assert outcome.code == 2
    assert outcome.err.startswith("error: the chat template of tiny failed: TemplateError: only questions;")
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_logits_that_are_not_finite_keep_what_was_written_and_exit_1(run, arguments: list[str]) -> None:
    run.llm.engine.fail_after = 6
    outcome = run("x", *arguments)
    assert outcome.code == 1
    assert outcome.out == ("" if arguments else "the sky\n")
    last = outcome.err.splitlines()[-1]
    assert last == "error: request 'request-0': the logits are not finite; try --dtype float32"


def test_debug_shows_the_traceback(run) -> None:
    assert "Traceback" in run("   ", "--debug").err
    assert "Traceback" not in run("--quiet", "--", "--debug").err


def test_ctrl_c_while_loading_is_130(run, monkeypatch) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load_llm", interrupted)
    outcome = run("x")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


def test_compare_says_equal_and_the_ratio_of_the_medians(run) -> None:
    outcome = run("why?", "--compare")
    assert outcome.code == 0
    equal, speed = outcome.out.splitlines()
    assert equal == f"equal ids: yes ({len(run.llm.engine.answer)} tokens)"
    tokens = len(run.llm.engine.answer)
    per_step = tokens / math.ceil(tokens / 3)  # a scripted step takes half a second either way
    assert speed == (
        f"speed-up: {per_step:.2f}x (plain 2.0 tok/s, speculative {2 * per_step:.1f} tok/s, "
        f"{per_step:.2f} tokens per step, median of 3)"
    )
    # One short warm-up and three runs each way.
    assert len(run.llm.engine.prompts) == len(run.llm.engine.plain.prompts) == 4


@pytest.mark.parametrize(
    ("dtype", "arguments", "code"),
    [("float32", ["--allow-forks"], 1), ("bfloat16", [], 1), ("bfloat16", ["--allow-forks"], 0)],
)
def test_compare_reports_the_first_fork(run, dtype: str, arguments: list[str], code: int) -> None:
    run.llm = fakes.scripted(ANSWER, dtype=dtype)
    plain = run.llm.engine.without_speculation()
    plain.answer = run.llm.tokenizer.encode("the sea")
    outcome = run("why?", "--compare", "--repeat", "1", *arguments)
    assert outcome.code == code
    assert outcome.out.startswith(f"equal ids: no, first fork at token 4 ({dtype}, plain and speculative): plain ")
    ids = [run.llm.tokenizer.encode(letter)[0] for letter in "ek"]
    assert f"plain {ids[0]} 'e', speculative {ids[1]} 'k', logit gap {ids[1] - ids[0]}\n" in outcome.out
    assert "median of 1" in outcome.out


def test_compare_as_json_and_a_fork_where_one_answer_ends(run) -> None:
    plain = run.llm.engine.without_speculation()
    plain.answer = run.llm.engine.answer[:7]
    outcome = run("why?", "--compare", "--json", "--repeat", "2")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert (found["equal"], found["tokens"], found["repeat"]) == (False, 7, 2)
    assert found["fork"]["position"] == 7
    assert found["fork"]["plain"] is None and found["fork"]["logit_gap"] is None
    assert found["fork"]["speculative"]["id"] == run.llm.engine.answer[7]


def test_compare_without_a_drafter_is_refused(run) -> None:
    run.llm.engine.speculative = False
    outcome = run("why?", "--compare")
    assert outcome.code == 2
    assert "--compare" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "choice", "colored"),
    [
        ({}, "auto", True),
        ({"NO_COLOR": "1"}, "auto", False),
        ({"NO_COLOR": ""}, "auto", True),
        ({"TERM": "dumb"}, "auto", False),
        ({"NO_COLOR": "1"}, "always", True),
        ({}, "never", False),
    ],
)
def test_colour_on_a_terminal_follows_no_color_and_the_option(monkeypatch, variables, choice, colored: bool) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(choice, terminal) is colored
    writer(terminal, wants_color(choice, terminal))([Piece("x", True), Piece("y", False)])
    assert ("\x1b[" in terminal.getvalue()) is colored
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()) == "xy"
