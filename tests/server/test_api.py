"""What the two routes answer: every field, both forms, the same tokens as the library."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from redrafter import LLM, SamplingParams
from tests.server.client import MESSAGES, chat, complete, error_of, events
from tests.server.serving import tiny_llm


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def expected(llm: LLM, **params: Any) -> Any:
    settings = SamplingParams(**{"temperature": 1.0, "seed": 1, "max_new_tokens": 8, **params})
    return llm.generate([MESSAGES], settings)[0]


def test_a_chat_is_what_the_library_says(server_url: str, llm: LLM) -> None:
    body = chat(server_url).json()
    whole = expected(llm)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": whole.text, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["id"].startswith("chatcmpl-") and body["created"] > 1.7e9
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(whole.prompt_token_ids) and usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_text_completion_continues_text_and_token_ids_alike(server_url: str, llm: LLM) -> None:
    whole = llm.generate("why", SamplingParams(temperature=1.0, seed=1, max_new_tokens=8), raw=True)[0]
    for prompt in ("why", ["why"], list(whole.prompt_token_ids)):
        body = complete(server_url, prompt=prompt).json()
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
        assert body["choices"] == [{"index": 0, "text": whole.text, "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.8}),
        ({"top_k": 4}, {"top_k": 4}),
        ({"top_k": -1}, {}),
        ({"min_p": 0.2}, {"min_p": 0.2}),
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"7": 100, "9": 99}}, {"logit_bias": {7: 100.0, 9: 99.0}}),
        ({"seed": -5}, {"seed": 2**64 - 5}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_new_tokens": 3}),
        ({"temperature": None, "stop": None, "n": None, "tools": None}, {}),
        ({"tools": [], "response_format": {"type": "text"}, "user": "me", "of_tomorrow": {"a": 1}}, {}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "why"}, {"type": "text", "text": "?"}]}
                ]
            },
            {},
        ),
    ],
)
def test_a_field_does_what_the_library_does_with_it(server_url: str, llm: LLM, fields: dict, params: dict) -> None:
    response = chat(server_url, **fields)
    assert response.status_code == 200, response.text
    whole = expected(llm, **params)
    assert response.json()["choices"][0]["message"]["content"] == whole.text
    streamed = events(chat(server_url, stream=True, **fields))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == whole.text


def test_a_developer_is_a_system(server_url: str) -> None:
    talks = [[{"role": role, "content": "be brief"}, *MESSAGES] for role in ("system", "developer")]
    one, two = (chat(server_url, messages=talk).json()["choices"][0]["message"]["content"] for talk in talks)
    assert one == two != chat(server_url).json()["choices"][0]["message"]["content"]


def test_no_seed_means_another_answer_every_time(server_url: str) -> None:
    texts = {chat(server_url, seed=None, max_tokens=20).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(texts) == 3


def test_several_answers_to_one_seed_differ_and_each_is_that_of_its_index(server_url: str, llm: LLM) -> None:
    choices = chat(server_url, n=4).json()["choices"]
    whole = [expected(llm, answer_index=index).text for index in range(4)]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["message"]["content"] for choice in choices] == whole
    assert len(set(whole)) == 4
    texts = [""] * 4
    for event in events(chat(server_url, n=4, stream=True)):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == whole
    body = chat(server_url, n=4).json()
    assert body["usage"]["completion_tokens"] == 32 and "metrics" not in body


def test_a_stream_opens_with_the_role_and_ends_with_reason_usage_and_done(server_url: str, llm: LLM) -> None:
    plain = events(chat(server_url, stream=True))
    assert all(set(e) == {"id", "object", "created", "model", "system_fingerprint", "choices"} for e in plain)
    assert len({e["id"] for e in plain}) == 1 and plain[0]["object"] == "chat.completion.chunk"
    assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert plain[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert all(e["choices"][0]["finish_reason"] is None for e in plain[:-1])
    *rest, last = events(chat(server_url, stream=True, stream_options={"include_usage": True}))
    assert [e["choices"][0]["delta"] for e in rest] == [e["choices"][0]["delta"] for e in plain]
    assert all(e["usage"] is None for e in rest)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    options = {"include_usage": True, "continuous_usage_stats": True}
    *rest, last = events(chat(server_url, stream=True, stream_options=options))
    counts = [e["usage"]["completion_tokens"] for e in (*rest, last)]
    assert counts[0] == 0 and counts[-1] == 8 and counts == sorted(counts) and len(set(counts)) > 2


def test_a_text_stream_has_texts(server_url: str, llm: LLM) -> None:
    whole = complete(server_url).json()["choices"][0]["text"]
    parts = events(complete(server_url, stream=True))
    assert "".join(e["choices"][0]["text"] for e in parts) == whole
    assert parts[-1]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(server_url: str, llm: LLM, stream: bool) -> None:
    text = expected(llm, max_new_tokens=40).text
    stop = text[len(text) // 2 :][:2]
    fields = {"max_tokens": 40, "stop": ["never this", stop]}
    if stream:
        got = events(chat(server_url, stream=True, **fields))
        said = "".join(e["choices"][0]["delta"].get("content", "") for e in got)
        reason = got[-1]["choices"][0]["finish_reason"]
    else:
        choice = chat(server_url, **fields).json()["choices"][0]
        said, reason = choice["message"]["content"], choice["finish_reason"]
    assert (said, reason) == (text.partition(stop)[0], "stop")


def test_stop_token_ids_end_the_answer(server_url: str, llm: LLM) -> None:
    whole = expected(llm)
    body = chat(server_url, stop_token_ids=[whole.token_ids[3]]).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == whole.token_ids.index(whole.token_ids[3])


def test_logprobs_of_a_chat_are_the_targets(server_url: str, llm: LLM) -> None:
    whole = expected(llm, logprobs=3)
    content = chat(server_url, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx([own.logprob for own in whole.logprobs], abs=1e-5)
    for entry, token, own in zip(content, whole.token_ids, whole.logprobs, strict=True):
        assert bytes(entry["bytes"]) == llm.tokenizer.token_bytes(token)
        assert [bytes(top["bytes"]) for top in entry["top_logprobs"]] == [
            llm.tokenizer.token_bytes(t) for t, _ in own.top
        ]
    streamed = events(chat(server_url, stream=True, logprobs=True, top_logprobs=3))
    parts = [e["choices"][0]["logprobs"]["content"] for e in streamed if e["choices"][0]["logprobs"]]
    assert [entry["bytes"] for part in parts for entry in part] == [entry["bytes"] for entry in content]
    (bare,) = chat(server_url, logprobs=True, max_tokens=1).json()["choices"]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_of_a_text_have_the_older_form(server_url: str, llm: LLM) -> None:
    found = complete(server_url, logprobs=2).json()["choices"][0]["logprobs"]
    assert {len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {8}
    assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])
    assert all(len(top) <= 2 for top in found["top_logprobs"]) and all(value <= 0 for value in found["token_logprobs"])


def test_details_tell_drafted_text_from_the_targets_own(server_url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": 1, "stream": True}
    headers = {"X-Redrafter-Details": "1"}
    got = events(httpx2.post(server_url + "/v1/chat/completions", json=body, headers=headers, timeout=60))
    told = [(e["redrafter"], e["choices"][0]["delta"]["content"]) for e in got if "redrafter" in e]
    assert all("".join(text for text, _ in details["spans"]) == content for details, content in told)
    assert {drafted for details, _ in told for _, drafted in details["spans"]} == {True, False}
    assert all(d["step"]["nodes"] == 10 and 0 <= d["step"]["accepted"] <= 3 for d, _ in told)
    assert sum(d["step"]["seconds"] for d, _ in told) > 0
    assert not any("redrafter" in e for e in events(chat(server_url, stream=True)))


def test_details_show_the_tree_of_each_step(server_url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "seed": 1, "stream": True}
    headers = {"X-Redrafter-Details": "1"}
    got = events(httpx2.post(server_url + "/v1/chat/completions", json=body, headers=headers, timeout=60))
    trees = [(e["redrafter"]["tree"], e["redrafter"]["step"]) for e in got if "redrafter" in e]
    assert trees
    for tree, step in trees:
        assert len(tree["tokens"]) == len(tree["parent"]) == step["nodes"]
        assert tree["parent"][0] == -1 and all(0 <= p < i for i, p in enumerate(tree["parent"][1:], 1))
        path = tree["accepted"]
        assert path[0] == 0 and len(path) == step["accepted"] + 1
        assert [tree["parent"][node] for node in path[1:]] == path[:-1]
    body["speculation"] = False
    got = events(httpx2.post(server_url + "/v1/chat/completions", json=body, headers=headers, timeout=60))
    assert {e["redrafter"]["tree"] is None for e in got if "redrafter" in e} == {True}


def test_without_speculation_the_tokens_are_the_same_and_nothing_is_drafted(server_url: str, llm: LLM) -> None:
    body = chat(server_url, speculation=False, max_tokens=20).json()
    assert body["choices"][0]["message"]["content"] == expected(llm, max_new_tokens=20).text
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 0
    assert body["metrics"]["speculative_decoding"]["mean_acceptance_length"] == 1.0
    assert chat(server_url).json()["metrics"]["speculative_decoding"]["num_spec_steps"] > 0


def test_five_at_once_say_what_each_says_alone(server_url: str, llm: LLM) -> None:
    asks = [
        {"seed": seed, "max_tokens": 30 + 7 * seed, "temperature": temperature, "stream": seed % 2 == 0}
        for seed, temperature in enumerate((1.0, 0.0, 0.8, 1.2, 1.0))
    ]

    def ask(fields: dict[str, Any]) -> str:
        response = chat(server_url, **fields)
        if fields["stream"]:
            return "".join(e["choices"][0]["delta"].get("content", "") for e in events(response))
        return response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(5) as pool:
        said = list(pool.map(ask, asks))
    alone = [
        expected(llm, seed=a["seed"], max_new_tokens=a["max_tokens"], temperature=a["temperature"]).text for a in asks
    ]
    assert said == alone


def test_the_model_is_listed_and_others_are_not_found(server_url: str) -> None:
    (card,) = httpx2.get(server_url + "/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert httpx2.get(server_url + "/v1/models/tiny").json() == card
    assert chat(server_url, model="tiny").status_code == 200
    for response in (httpx2.get(server_url + "/v1/models/gpt-4"), chat(server_url, model="gpt-4")):
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


def test_info_says_what_runs(server_url: str) -> None:
    info = httpx2.get(server_url + "/v1/redrafter/info").json()
    assert (info["model"], info["drafter"]) == ("tiny", "tiny-drafter")
    assert info["config"]["draft_length"] == 3 and info["version"]


def test_the_page_comes_with_a_policy_that_allows_nothing_from_elsewhere(server_url: str) -> None:
    response = httpx2.get(server_url + "/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_the_description_names_every_route_and_its_schemas(server_url: str) -> None:
    document = httpx2.get(server_url + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready"} <= set(document["paths"])
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    assert document["components"]["schemas"][name]["required"] == ["messages"]


@pytest.mark.parametrize("cold", [1e-40, 5e-324])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(server_url: str, cold: float) -> None:
    greedy, colder = (complete(server_url, temperature=t).json()["choices"] for t in (0, cold))
    assert greedy == colder and greedy[0]["finish_reason"] == "length"
