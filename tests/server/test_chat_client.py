"""``redrafter chat --url`` against the real server: the answers of the model itself, turn by turn."""

from __future__ import annotations

import io

import pytest

from redrafter.cli import main
from redrafter.params import SamplingParams
from tests.server.serving import Running, tiny_llm


def test_chat_says_what_the_model_says(server: Running, monkeypatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/temp 0.7\none\n/plain\ntwo\n")))
    assert main(["chat", "--url", server.url, "--max-new-tokens", "12", "--seed", "5"]) == 0
    out, err = capfdbinary.readouterr()
    llm, params = tiny_llm(), SamplingParams(max_new_tokens=12, seed=5, temperature=0.7)
    messages: list[dict[str, str]] = []
    for question in ("one", "two"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": llm.generate(messages, params)[0].text})
    assert out.decode() == "".join(m["content"] + "\n" for m in messages[1::2])
    assert err.decode().count("12 tokens in ") == 2 and "1.00 tokens per step" in err.decode()
