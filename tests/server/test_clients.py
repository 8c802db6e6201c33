"""Clients that others wrote, as their users run them: openai, curl, llm, guidellm. Nothing is told to them but the URL.

openai belongs to the test extra. llm and guidellm pin versions that others here do not have, so they live in
environments of their own in ``.venv/clients``, or $REDRAFTER_CLIENTS: ``make test`` makes llm's, ``make clients`` both.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.client import MESSAGES, chat
from tests.server.serving import Running, running, tiny_llm

CLIENTS = Path(os.environ.get("REDRAFTER_CLIENTS", Path(__file__).parents[2] / ".venv" / "clients"))
openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'redrafter[test]'")


def expected(url: str, **fields: Any) -> str:
    return chat(url, model="tiny", messages=MESSAGES, **fields).json()["choices"][0]["message"]["content"]


@pytest.fixture
def client(server_url: str) -> Any:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_lists_the_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "redrafter"


def test_openai_chats_whole_and_streamed(client: Any, server_url: str) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "seed": 4, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text == expected(server_url, seed=4, max_tokens=30)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 30)
    assert whole.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and not chunks[-1].choices


def test_openai_seeds_answers_and_logprobs(client: Any) -> None:
    def ask(seed: int) -> Any:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, n=3, max_tokens=12, logprobs=True, top_logprobs=2, stop=["\n\n"]
        )
        return [(c.index, c.message.content, [t.logprob for t in c.logprobs.content]) for c in answer.choices]

    first = ask(1)
    assert first == ask(1) and first != ask(2)
    assert [index for index, _, _ in first] == [0, 1, 2] and len({text for _, text, _ in first}) == 3
    assert all(len(logprobs) == 12 and max(logprobs) <= 0 for _, _, logprobs in first)


def test_openai_completes_text(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "why", "seed": 1, "max_tokens": 9, "logprobs": 1}
    whole = client.completions.create(**asked)
    assert len(whole.choices[0].logprobs.tokens) == 9
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_openai_at_once(server_url: str) -> None:
    async def stream(client: Any, seed: int) -> str:
        parts = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, max_tokens=20, stream=True
        )
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="any") as client:
            return await asyncio.gather(*(stream(client, seed) for seed in range(8)))

    assert asyncio.run(ask()) == [expected(server_url, seed=seed, max_tokens=20) for seed in range(8)]


def test_openai_raises_its_own_errors(client: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="tiny", messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        create(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError) as absent:
        create(model="gpt-4o", messages=MESSAGES)
    assert absent.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="tiny", messages=[{"role": "user", "content": "a" * 400}])
    assert long.value.code == "context_length_exceeded"


def test_openai_is_told_of_keys_and_of_a_full_house() -> None:
    with running(tiny_llm(max_batch=1), max_queue=0, api_keys=("a-key-of-mine",)) as run:
        stranger = openai.OpenAI(base_url=f"{run.url}/v1", api_key="another-key")
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with openai.OpenAI(base_url=f"{run.url}/v1", api_key="a-key-of-mine", max_retries=0) as client:
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=240, stream=True)
            with pytest.raises(openai.InternalServerError) as full:
                client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert full.value.status_code == 503 and full.value.code == "overloaded"
            stream.close()
            again = client.with_options(max_retries=5).chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=1
            )
            assert again.usage.completion_tokens == 1


def test_openai_leaving_a_stream_frees_its_row(client: Any, server: Running) -> None:
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=240, stream=True):
        if chunk.choices[0].delta.content:
            break
    client.close()
    assert chat(server.url, max_tokens=2).status_code == 200
    server.engine.check()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")


@needs_curl
@pytest.mark.parametrize("stream", [False, True])
def test_curl(server_url: str, stream: bool) -> None:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "seed": 2, "max_tokens": 20, "stream": stream})
    # As documentation everywhere has it: -d, a header, nothing else.
    command = ["curl", "-sS", "-i", f"{server_url}/v1/chat/completions"]
    done = subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", body], capture_output=True, timeout=60, check=True
    )
    head, _, answer = done.stdout.replace(b"\r\n", b"\n").partition(b"\n\n")
    assert head.startswith(b"HTTP/1.1 200")
    if stream:
        lines = [line for line in answer.decode().split("\n") if line]
        assert lines.pop() == "data: [DONE]"
        parts = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
        text = "".join(part.get("content") or "" for part in parts)
    else:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    assert text == expected(server_url, seed=2, max_tokens=20)


@needs_curl
def test_curl_without_a_content_type_is_told_what_to_send(server_url: str) -> None:
    command = ["curl", "-sS", f"{server_url}/v1/chat/completions", "-d", "{}"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert "application/json" in json.loads(done.stdout)["error"]["message"]


def program(name: str) -> str:
    """A client's own program. Skips where its environment was not made."""
    path = CLIENTS / name / "bin" / name
    if not path.is_file():
        pytest.skip(f"{name} is not installed in an environment of its own: make clients")
    return str(path)


@pytest.mark.parametrize("options", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_llm(server_url: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    command = [program("llm"), "openai", "endpoint", f"{server_url}/v1", "-m", "tiny", "why?", *options]
    settings = ["-o", "seed", "3", "-o", "max_tokens", "20"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, *settings], capture_output=True, timeout=100, check=True, env=environment)
    assert done.stdout.decode().removesuffix("\n") == expected(server_url, seed=3, max_tokens=20)
    listed = subprocess.run([*command[:4], "--models"], capture_output=True, timeout=100, check=True, env=environment)
    assert listed.stdout.split() == [b"tiny"]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_guidellm(server_url: str, tmp_path: Path, stream: str) -> None:
    """A load tester: two at a time, four in all."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"{word}?"}) + "\n" for word in ("why", "how", "who", "when")))
    report = tmp_path / "report.json"
    command = [
        *(program("guidellm"), "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={server_url},model=tiny,stream={stream}"),
        *("--data", f"kind=json_file,path={questions}", "--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=4", "--output", f"kind=json,path={report}"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    assert (len(requests["successful"]), len(requests["errored"]), len(requests["incomplete"])) == (4, 0, 0)
    assert all(one["output_metrics"]["text_tokens"] > 0 for one in requests["successful"])
    assert httpx2.get(f"{server_url}/health").status_code == 200
