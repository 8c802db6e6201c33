"""The whole command on a tiny random model in a folder: files, tokenizer, engine, drafter, text. Nothing is faked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from redrafter.backends.torch.checkpoint import save_drafter
from redrafter.backends.torch.drafter import Drafter
from redrafter.cli import main
from redrafter.errors import InvalidRequest
from redrafter.llm import LLM
from tests import fakes
from tests.tiny import drafter_config, make_model

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 280


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and the folder of an untrained drafter for it."""
    base = tmp_path_factory.mktemp("folders")
    make_model("llama", attention="eager", vocab_size=VOCAB, eos_token_id=VOCAB - 1).save_pretrained(base / "model")
    fakes.byte_level().save_pretrained(base / "model")
    torch.manual_seed(3)
    save_drafter(Drafter(drafter_config(vocab_size=VOCAB)), base / "drafter", {})
    return base / "model", base / "drafter"


@pytest.fixture
def options(folders: tuple[Path, Path]) -> list[str]:
    model, drafter = folders
    return ["--model", str(model), "--drafter", str(drafter), "--dtype", "float32", "--device", "cpu"]


def test_compare_says_equal_ids_in_float32(options, capsys) -> None:
    code = main(["generate", "why?", *options, "--compare", "--repeat", "1", "--max-new-tokens", "20", "-q"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith("equal ids: yes (20 tokens)\nspeed-up: ")


def test_json_names_the_model_and_counts_what_it_did(options, capsys) -> None:
    arguments = [
        "generate",
        "why?",
        *options,
        "--json",
        "--max-new-tokens",
        "9",
        "--tree-size",
        "6",
        "--beam-width",
        "2",
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (len(found["token_ids"]), found["finish_reason"]) == (9, "length")
    assert found["model"] == options[1] and found["drafter"] == "drafter"
    assert found["statistics"]["answer_tokens"] == 9
    assert 1 <= found["statistics"]["tree_nodes"] / found["statistics"]["drafted_steps"] <= 6
    assert f"loading {options[1]}" in err.splitlines()


def test_without_a_drafter_the_same_text_and_a_word_about_it(options, capsys) -> None:
    arguments = ["generate", "why?", *options, "--max-new-tokens", "12"]
    assert main([*arguments, "-q"]) == 0
    drafted = capsys.readouterr().out
    assert main([*arguments, "--drafter", "none"]) == 0
    plain = capsys.readouterr()
    assert plain.out == drafted
    assert "no speculation: drafter none; decoding plainly" in plain.err


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--drafter", "no/such/folder"], 1, "no/such/folder"),
        (["--dtype", "int3"], 2, "int3"),
        (["--device", "abacus"], 2, "abacus"),
        (["--max-context", "8"], 2, "context holds 8"),
    ],
)
def test_what_does_not_fit_is_one_line(options, capsys, changed: list[str], code: int, says: str) -> None:
    assert main(["generate", "why? " * 9, *options, *changed, "-q"]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and says in err


def test_ctrl_c_in_mid_stream_of_the_real_engine(options) -> None:
    arguments = ["generate", "why?", *options, "--max-new-tokens", "200", "--temperature", "1", "--tree-size", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "redrafter.cli", *arguments],
        # A shell's background job ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    first = os.read(child.stdout.fileno(), 1)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=100)
    lines = errors.decode().splitlines()
    assert child.returncode == 130, errors
    assert (first + rest).endswith(b"\n")
    assert lines[-1] == "interrupted"
    assert any("tokens per step" in line for line in lines)
    assert "Traceback" not in errors.decode()


def test_compare_and_bench_read_every_prompt_anew(options, capsys, monkeypatch, tmp_path) -> None:
    reused: dict[Any, int] = {}
    close = LLM._close

    def watched(llm: LLM, reply: Any) -> None:
        reused[reply] = reply.completion.statistics.reused_tokens
        close(llm, reply)

    monkeypatch.setattr(LLM, "_close", watched)
    long = "a question that is asked again and again"
    shape = ["--tree-size", "6", "--beam-width", "2", "--branching", "2", "--draft-length", "3"]
    settings = [*options, *shape, "--max-new-tokens", "4", "-q"]
    assert main(["generate", long, *settings, "--compare", "--repeat", "2"]) == 0
    assert list(reused.values()) == [0] * 6
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": long}))
    assert main(["bench", *settings, "--prompts", str(tmp_path / "q.jsonl"), "--out", str(tmp_path)]) == 0
    assert list(reused.values()) == [0] * 10


@pytest.mark.parametrize("command", [["generate", "why?"], ["bench"], ["serve", "--port", "0"], ["chat"]])
def test_no_compile_reaches_the_loading_of_the_model(command, options, monkeypatch, capsys) -> None:
    asked: list[object] = []

    def opened(*names: object, **settings: object) -> None:
        asked.append(settings["compile"])
        raise InvalidRequest("enough")

    monkeypatch.setattr(LLM, "from_pretrained", opened)
    if command[0] == "serve":
        pytest.importorskip("uvicorn", reason="the serve extra is not installed")
        options = options[1:]  # there the model is an argument
    assert [main([*command, *options, *more]) for more in ([], ["--no-compile"])] == [2, 2]
    assert asked == [True, False]
    assert capsys.readouterr().err.count("error: enough") == 2
