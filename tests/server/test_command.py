"""``redrafter serve``: what it prints, refuses and returns."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from redrafter.cli import main
from redrafter.cli.serve import greeting
from tests.server.client import chat

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--i-know-this-is-open"),
        (["--request-metrics", "all"], "none, summary, detailed"),
        (["--metrics-names", "mine"], "native, vllm"),
        (["--log-level", "loud"], "debug, info, warning, error"),
        (["--api-key-file", "/nowhere/keys"], "cannot be read"),
        (["--host", "192.0.2.1", "--i-know-this-is-open"], "cannot be used"),
        (["--port", "70000"], "port"),
        (["--max-queue", "-1"], "max-queue"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redrafter.cli.options.load_llm", lambda *a, **k: pytest.fail("it was loaded"))
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redrafter.cli.options.load_llm", lambda *a, **k: pytest.fail("it was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert "pip install 'redrafter[serve]'" in capsys.readouterr().err


def test_the_line_to_try_has_a_key_if_one_is_needed() -> None:
    assert "Authorization" not in greeting("m", None, "http://127.0.0.1:8000", key=False)[3]
    lines = greeting("m", None, "http://127.0.0.1:8000", key=True)
    assert "-H 'Authorization: Bearer KEY'" in lines[3] and lines[1].endswith("decoding is plain")


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    script = (
        "import sys; from redrafter.cli import main, options; from tests.server.serving import tiny_llm; "
        "options.load_llm = lambda *a, **k: tiny_llm(); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "serve", "--port", "0", "--model-name", "mine"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stderr is not None
    try:
        told = [process.stderr.readline().rstrip() for _ in range(4)]
        assert told[:2] == ["model    mine", "drafter  tiny-drafter"], told
        address = told[2].split()[1]
        assert told[3].startswith(f"try      curl {address}/v1/chat/completions ")
        _wait_until_ready(address)
        assert chat(address).json()["model"] == "mine"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        assert any(line["message"] == "request" and line.get("answer_tokens") == 8 for line in log)
    finally:
        process.kill()
        process.stderr.close()


def _wait_until_ready(address: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            assert httpx2.get(address + "/ready").status_code == 200
            return
        except httpx2.HTTPError:
            assert time.monotonic() < end, "it never listened"
            time.sleep(0.02)
